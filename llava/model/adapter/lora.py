"""LoRA adapter directories, read strictly.

The layout is peft's, with LLaVA's `non_lora_trainables.bin` beside it for weights that were trained without an adapter,
the projector above all. Names of adapters that were trained on the llava-hf layout are translated.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.constants import STATE_FILE
from llava.model.adapter.adapter_config import (
    ADAPTER_CONFIG_FILE,
    is_saved,
    is_targeted,
    rank_of,
    read_adapter_settings,
    scale_of,
)
from llava.model.adapter.non_lora import open_gathered, read_non_lora
from llava.model.adapter.tensor_names import RELEASED, hf_names, is_derived, is_hf_name, lora_tensor, plain_name
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors, fingerprint
from llava.model.configuration import CONFIG_FILE

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LLAVA_RUN_FILES = (CONFIG_FILE, STATE_FILE)
"""Beside an adapter on the released layout these mean LLaVA's own training, which trains the projector too."""
_ORIGINAL_MODULE = ".original_module."
"""In names of the base's weights that peft keeps beside a module in `modules_to_save`."""
_PARTNERS = {"A": "B", "embedding_A": "embedding_B"}
OUTSIDE_LLM = r".*(vision_tower|mm_projector).*"
"""Names of modules that never carry an adapter, though some have the same leaf names as the LLM's."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter; tensors are by the name of the base's weight."""

    settings: Mapping[str, Any]  # content of `adapter_config.json`
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]  # A (r, in) and B (out, r)
    replaced: LazyTensors  # trained without an adapter
    magnitudes: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)  # DoRA's length (out,) of each row
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)  # layer's name in the model that was trained

    def module(self, name: str) -> str:
        """Return a layer's name in the model that was trained, by the name of its weight."""
        return self.modules.get(name, name.removesuffix(".weight"))

    def scale(self, name: str) -> float:
        """Return the factor of B A for the weight of that name."""
        return scale_of(self.settings, self.module(name), self.pairs[name][0].shape[0])

    @property
    def is_of_hf(self) -> bool:
        """Whether it was trained on a model in the llava-hf layout."""
        return any(is_hf_name(self.module(name)) for name in self.pairs)

    @property
    def trains_projector(self) -> bool:
        """Whether the projector was trained with it."""
        return any("mm_projector" in name for name in (*self.pairs, *self.replaced))

    def inside_llm(self) -> Adapter:
        """Return the products for the linear layers of the LLM's blocks."""
        pairs = {name: pair for name, pair in self.pairs.items() if is_llm_block(name)}
        return dataclasses.replace(self, pairs=pairs, replaced=LazyTensors({}))

    def outside_llm(self) -> Adapter:
        """Return the products for other weights, and all of `replaced`; usually there are no such products."""
        pairs = {name: pair for name, pair in self.pairs.items() if not is_llm_block(name)}
        return dataclasses.replace(self, pairs=pairs)

    def fingerprint(self) -> str:
        """Return a short hash of the trained tensors."""
        halves = {f"{name}.{half}": pair[half] for name, pair in self.pairs.items() for half in (0, 1)}
        lengths = {f"{name}.length": tensor for name, tensor in self.magnitudes.items()}
        return fingerprint(self.replaced.overlaid({**halves, **lengths}))


def is_llm_block(name: str) -> bool:
    """Tell whether a weight belongs to one of the LLM's blocks."""
    return name.startswith("model.layers.")


def read_adapter(directory: str | Path, mm_projector: str | Path | None = None) -> Adapter:
    """Open a LoRA adapter that was trained here or by the original, peft, LLaMA-Factory or ms-swift.

    Args:
        directory: of the adapter.
        mm_projector: where the projector is, if not in the directory; see `read_non_lora`.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if a setting is not supported here, or a tensor is empty, unknown or without its partner.
    """
    directory = Path(directory)
    settings = read_adapter_settings(directory)
    products, trained = _sort_tensors(open_gathered(_adapter_file(directory)), directory)
    adapter = Adapter(
        settings,
        {name: _pair(name, module, parts, settings, directory) for name, (module, parts) in products.items()},
        trained,
        {name: parts["magnitude_vector"][1] for name, (_, parts) in products.items() if "magnitude_vector" in parts},
        {name: module for name, (module, _) in products.items()},
    )
    is_llava_run = not adapter.is_of_hf and any((directory / name).is_file() for name in _LLAVA_RUN_FILES)
    beside = read_non_lora(directory, mm_projector, is_needed=is_llava_run and not adapter.trains_projector)
    for name in sorted(trained.keys() & beside.keys()):
        if not torch.equal(trained[name], beside[name]):
            raise ValueError(
                f"{name} has one value in {trained.entries[name].source} and another in {beside.entries[name].source}; "
                "remove the one that is not the result of the training"
            )
    return dataclasses.replace(adapter, replaced=trained.overlaid(beside.entries))


def _adapter_file(directory: Path) -> Path:
    found = [directory / name for name in ADAPTER_FILES if (directory / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{directory} lacks {' or '.join(ADAPTER_FILES)}; use the directory that training wrote, complete"
        )
    if len(found) > 1:
        logger.warning("%s holds %s; the first is read, as peft does", directory, " and ".join(ADAPTER_FILES))
    return found[0]


_Parts = dict[str, tuple[str, LazyTensor]]
"""By kind of `lora_tensor`, name in the file and tensor."""


def _sort_tensors(tensors: LazyTensors, directory: Path) -> tuple[dict[str, tuple[str, _Parts]], LazyTensors]:
    """Return, by weight name, module and parts of each product; and by weight name the tensors trained whole."""
    products: dict[str, tuple[str, _Parts]] = {}
    trained: dict[str, LazyTensor] = {}
    for name, entry in tensors.entries.items():
        if _ORIGINAL_MODULE in name or is_derived(name):
            continue
        found = lora_tensor(name)
        weight = plain_name(f"{found.module}.weight" if found else name)
        if found is not None:
            parts = products.setdefault(weight, (found.module, {}))[1]
            if found.kind in parts:
                raise ValueError(
                    f"{directory} holds {weight} twice, as {parts[found.kind][0]} and as {name}; fetch it again"
                )
            parts[found.kind] = (name, entry)
        elif ".lora_" in name or not weight.startswith(RELEASED):
            raise ValueError(f"{directory}: {name} is not part of a LoRA adapter")
        elif weight in trained:
            raise ValueError(f"{directory} holds {weight} twice, once as {name}; fetch it again")
        else:
            trained[weight] = entry
    if not products:
        raise ValueError(f"{directory} holds no tensor of a LoRA adapter; fetch it again")
    return products, LazyTensors(trained)


def _pair(
    name: str, module: str, parts: _Parts, settings: Mapping[str, Any], directory: Path
) -> tuple[LazyTensor, LazyTensor]:
    """Return A (r, in) and B (out, r) of a product whose parts are complete and fit each other."""
    for low, high in _PARTNERS.items():
        if low in parts and high not in parts:
            partner = parts[low][0].replace(f".lora_{low}", f".lora_{high}")
            raise ValueError(f"{directory}: {parts[low][0]} has no {partner}; fetch the adapter again")
        if high in parts and low not in parts:
            raise ValueError(f"{directory}: {parts[high][0]} is not part of a LoRA adapter")
    is_embedding, is_dora = "embedding_A" in parts, bool(settings.get("use_dora"))
    if "magnitude_vector" in parts and (is_embedding or not is_dora):
        raise ValueError(f"{directory}: {parts['magnitude_vector'][0]} is not part of a LoRA adapter")
    if ("magnitude_vector" in parts) != is_dora or not {"A", "embedding_A"} & parts.keys():
        raise ValueError(f"{directory}: {name} has not both a product and a length; fetch the adapter again")
    if is_embedding:  # (r, rows) and (width, r): transposed against a linear layer's
        down, up = (_transposed(parts[kind][1]) for kind in ("embedding_B", "embedding_A"))
    else:
        down, up = parts["A"][1], parts["B"][1]
    rank = rank_of(settings, module)
    if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] == up.shape[1] == rank:
        raise ValueError(
            f"{directory}: A and B of {name} are {tuple(down.shape)} and {tuple(up.shape)}, but the rank is {rank} by "
            f"{ADAPTER_CONFIG_FILE}; use the {ADAPTER_CONFIG_FILE} that belongs to them"
        )
    return down, up


def _transposed(entry: LazyTensor) -> LazyTensor:
    return LazyTensor(torch.Size(reversed(entry.shape)), entry.dtype, lambda: entry.read().t(), entry.source)


def refuse_partial(adapter: Adapter, base: LazyTensors) -> None:
    """Make sure that the adapter has a tensor for everything that its settings say was trained.

    Raises:
        ValueError: if a targeted layer has no adapter, or a module in `modules_to_save` no weight.
    """
    block = next((name for name in adapter.pairs if is_llm_block(name)), None)
    if block is not None:
        prefix = adapter.module(block).removesuffix(_module(block))
        for name, entry in base.entries.items():
            is_linear = is_llm_block(name) and name.endswith(".weight") and len(entry.shape) == 2
            if is_linear and name not in adapter.pairs and is_targeted(adapter.settings, prefix + _module(name)):
                raise ValueError(
                    f"the adapter has nothing for {prefix + _module(name)}, which target_modules in its "
                    f"{ADAPTER_CONFIG_FILE} names; fetch the adapter again"
                )
    for name in sorted(base.keys() - adapter.replaced.keys()):
        if not is_derived(name) and any(is_saved(adapter.settings, each) for each in (name, *hf_names(name))):
            raise ValueError(
                f"the adapter has no {name}, which modules_to_save in its {ADAPTER_CONFIG_FILE} names; fetch the "
                "adapter again"
            )


def _module(name: str) -> str:
    """Return the part of a block's weight name that is the same in every layout, `layers.0.mlp.up_proj`."""
    return name.removeprefix("model.").removesuffix(".weight")
