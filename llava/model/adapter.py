"""LoRA directories: reading them and adding them to the weights they were trained on, W + scale * B A.

Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rank-stabilised scale), Liu et al. 2024 (DoRA); the layout is
peft's, with LLaVA's `non_lora_trainables.bin` beside it for what was trained without an adapter, the projector above
all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.files import read_settings
from llava.model.lazy_tensors import LazyTensor, LazyTensors, fingerprint
from llava.model.weights import find_weight_file, load_plain_pickle, open_tensor_file, open_weights

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILE = "mm_projector.bin"
DEEPSPEED_STATES = "global_step*/mp_rank_00_model_states.pt"
"""The whole model in an unfinished run's directory, as DeepSpeed writes it up to ZeRO-2."""
PEFT_PREFIX = "base_model.model."
_BLOCK_ROWS = 256
_OTHER_SUMS = (
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of peft under which an adapter is neither W + scale B A nor DoRA, or not everywhere."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""How an adapter may have begun; peft's others (PiSSA, OLoRA, LoftQ, ...) take something from the base first."""
OUTSIDE_LLM = r".*(vision_tower|mm_projector).*"
"""Module names that never carry an adapter, though some are called like those of the LLM."""
_MAGNITUDE = ".lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA directory.

    Attributes:
        settings: content of `adapter_config.json`.
        pairs: by weight name, the tensors A (r, in) and B (out, r).
        replaced: by weight name, tensors trained without an adapter.
        magnitudes: by weight name, the length (out,) of each row of the sum; of DoRA alone.
    """

    settings: Mapping[str, Any]
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]
    replaced: LazyTensors
    magnitudes: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)

    def scale(self, rank: int) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.settings["lora_alpha"] / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def outside_llm(self) -> Adapter:
        """Return the part that changes other weights than the LLM's blocks; usually nothing but `replaced`."""
        return dataclasses.replace(
            self, pairs={name: pair for name, pair in self.pairs.items() if not is_llm_block(name)}
        )

    def fingerprint(self) -> str:
        """Return a short identity of what was trained."""
        halves = {f"{name}.{half}": pair[half] for name, pair in self.pairs.items() for half in (0, 1)}
        lengths = {f"{name}.length": tensor for name, tensor in self.magnitudes.items()}
        return fingerprint(self.replaced.overlaid({**halves, **lengths}))


def is_llm_block(name: str) -> bool:
    """Tell whether a weight belongs to one of the LLM's blocks."""
    return name.startswith("model.layers.")


def plain_name(name: str) -> str:
    """Return a tensor's name in the released layout, without what peft puts before it."""
    name = name.removeprefix(PEFT_PREFIX)
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def read_adapter(directory: str | Path, mm_projector: str | Path | None = None) -> Adapter:
    """Open a LoRA directory, of peft, the original or ours.

    Args:
        directory: of the adapter.
        mm_projector: where the projector is, if not in the directory; see `read_non_lora`.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if it uses what is not supported here, or a pair is not complete.
    """
    directory = Path(directory)
    settings = read_settings(directory / ADAPTER_CONFIG_FILE)
    start = settings.get("init_lora_weights")
    unfit = [key for key in _OTHER_SUMS if settings.get(key)]
    unfit += [] if start is None or start in _PLAIN_STARTS else [f"init_lora_weights {start!r}"]
    if unfit:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG_FILE}: {unfit[0]} is not supported; merge this adapter with peft"
        )
    tensors = open_tensor_file(_existing(directory, ADAPTER_FILES))
    pairs = _find_pairs(tensors, directory)
    partners = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    lengths = {name for name in tensors if _MAGNITUDE in name} if settings.get("use_dora") else set()
    others = [name for name in tensors if ".lora_A." not in name and name not in partners | lengths]
    if others or not pairs:
        raise ValueError(f"{directory}: {others[0] if others else 'no tensor'} is no part of a LoRA adapter")
    magnitudes = {plain_name(name.partition(_MAGNITUDE)[0]) + ".weight": tensors.entries[name] for name in lengths}
    if settings.get("use_dora") and (lacking := sorted(pairs.keys() ^ magnitudes.keys())):
        raise ValueError(f"{directory}: {lacking[0]} has not both a product and a length; fetch the adapter again")
    return Adapter(settings, pairs, read_non_lora(directory, mm_projector), magnitudes)


def _find_pairs(tensors: LazyTensors, directory: Path) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    pairs = {}
    for name in tensors:
        stem, mark, _ = name.partition(".lora_A.")
        if mark:
            partner = name.replace(".lora_A.", ".lora_B.")
            if partner not in tensors:
                raise ValueError(f"{directory}: {name} has no {partner}; fetch the adapter again")
            pairs[plain_name(stem) + ".weight"] = (tensors.entries[name], tensors.entries[partner])
    return pairs


def read_non_lora(directory: Path, mm_projector: str | Path | None = None) -> LazyTensors:
    """Open what was trained beside the adapter, the projector above all.

    It is a file of its own; directories of the original's unfinished runs have it inside DeepSpeed's states alone.

    Args:
        directory: of the adapter.
        mm_projector: for a directory without it: a file of it, or a directory that holds a projector.

    Raises:
        FileNotFoundError: if it is nowhere: without it the projector's training is lost.
        ValueError: if it is in the directory and `mm_projector` is given too, or if the states hold no projector.
    """
    places = [path for name in NON_LORA_FILES if (path := directory / name).is_file()]
    states = sorted(directory.glob(DEEPSPEED_STATES))
    if mm_projector is not None:
        if places:
            raise ValueError(f"{places[0]} is the projector trained with the adapter; leave --mm-projector out")
        return _projector_of(Path(mm_projector))
    if places:
        return open_tensor_file(places[0]).renamed(plain_name)
    if states:
        return _projector_in_states(states[-1])
    raise FileNotFoundError(
        f"{directory} lacks {' or '.join(NON_LORA_FILES)}, which holds the projector trained with the adapter; use the "
        "directory that training wrote, complete, or pass --mm-projector with a directory or file of the projector "
        "(the base, to keep the base's)"
    )


def _projector_of(place: Path) -> LazyTensors:
    """Return the projector in a file, or in a directory of any kind."""
    if place.is_dir():
        files = [place / name for name in (*NON_LORA_FILES, PROJECTOR_FILE)]
        place = next((file for file in files if file.is_file()), place)
    is_weights = place.is_dir() and find_weight_file(place) is not None
    tensors = open_weights(place) if is_weights else open_tensor_file(place)
    found = tensors.renamed(lambda name: plain_name(name) if "mm_projector" in name else None)
    if not found:
        raise ValueError(f"{place} holds no projector; name a file or directory that does")
    return found


def _projector_in_states(path: Path) -> LazyTensors:
    states = load_plain_pickle(path)
    module = states.get("module") if isinstance(states, dict) else None
    projector = {name: tensor for name, tensor in (module or {}).items() if "mm_projector" in name}
    if not projector:
        raise ValueError(f"{path} holds no projector; pass --mm-projector with a directory or file of it")
    return LazyTensors.of(projector).renamed(plain_name)


def read_projector(directory: str | Path) -> LazyTensors:
    """Open `mm_projector.bin` of a directory, or such a file itself, with names as in full weights."""
    path = Path(directory)
    return open_tensor_file(path / PROJECTOR_FILE if path.is_dir() else path).renamed(plain_name)


def add_adapter(base: LazyTensors, adapter: Adapter, dtype: torch.dtype | None = None) -> LazyTensors:
    """Return the base's tensors with the adapter added in fp32 and cast once.

    Args:
        base: full weights.
        adapter: trained on them.
        dtype: of the sums; None = that of the base's tensor.

    Raises:
        ValueError: if the base lacks a tensor that the adapter changes.
    """
    added = {name for name in adapter.replaced if "mm_projector" in name}  # a base may have no projector yet
    strangers = sorted((adapter.pairs.keys() | adapter.replaced.keys()) - base.keys() - added)
    if strangers:
        raise ValueError(f"the base has no {strangers[0]}, which the adapter changes; name the base it was trained on")
    merged = {name: _merged(name, base.entries[name], pair, adapter, dtype) for name, pair in adapter.pairs.items()}
    return base.overlaid({**adapter.replaced.entries, **merged})


def _merged(
    name: str, base: LazyTensor, pair: tuple[LazyTensor, LazyTensor], adapter: Adapter, dtype: torch.dtype | None
) -> LazyTensor:
    down, up = pair
    if base.shape != (up.shape[0], down.shape[1]):
        raise ValueError(
            f"{name} is {tuple(base.shape)} in the base, but {(up.shape[0], down.shape[1])} in the adapter"
        )
    scale = adapter.scale(down.shape[0])
    result = dtype or base.dtype
    read = functools.partial(_merge_weight, base, down, up, adapter.magnitudes.get(name), scale, result)
    return LazyTensor(base.shape, result, read, f"{base.source} + {down.source}")


def _merge_weight(
    base: LazyTensor, down: LazyTensor, up: LazyTensor, magnitude: LazyTensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return W + scale B A, for DoRA with its rows brought to their lengths, computed in fp32 and cast once.

    It goes by blocks of rows, whose fp32 numbers fit into the cache.
    """
    weight, outer, inner = base.read(), up.read(), down.read().float()
    lengths = None if magnitude is None else magnitude.read().float()
    merged = torch.empty(weight.shape, dtype=dtype)
    block = torch.empty(min(_BLOCK_ROWS, len(weight)), weight.shape[1])
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        sums = block[: len(weight[rows])].copy_(weight[rows])
        sums.addmm_(outer[rows].float(), inner, alpha=scale)
        if lengths is not None:
            sums *= (lengths[rows] / torch.linalg.norm(sums, dim=1)).unsqueeze(1)
        merged[rows] = sums
    return merged


def _existing(directory: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} lacks {' or '.join(names)}; use the directory that training wrote, complete")
