"""LoRA directories: reading them and adding them to the weights they were trained on, W + scale * B A.

Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rank-stabilised scale); the layout is peft's, with LLaVA's
`non_lora_trainables.bin` beside it for what was trained without an adapter, the projector above all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.files import read_settings
from llava.model.weights import LazyTensors, open_tensor_file

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILE = "mm_projector.bin"
PEFT_PREFIX = "base_model.model."
OUTSIDE_LLM = r".*(vision_tower|mm_projector).*"
"""Module names that never carry an adapter, though some are called like those of the LLM."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA directory.

    Attributes:
        settings: content of `adapter_config.json`.
        pairs: by weight name, the tensors A (r, in) and B (out, r), lazily.
        replaced: by weight name, tensors trained without an adapter.
    """

    settings: Mapping[str, Any]
    pairs: Mapping[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]
    replaced: LazyTensors

    def scale(self, rank: int) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.settings["lora_alpha"] / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def outside_llm(self) -> Adapter:
        """Return the part that changes other weights than the LLM's blocks; usually nothing but `replaced`."""
        return dataclasses.replace(
            self, pairs={name: pair for name, pair in self.pairs.items() if not is_llm_block(name)}
        )


def is_llm_block(name: str) -> bool:
    """Tell whether a weight belongs to one of the LLM's blocks."""
    return name.startswith("model.layers.")


def plain_name(name: str) -> str:
    """Return a tensor's name in the released layout, without what peft puts before it."""
    name = name.removeprefix(PEFT_PREFIX)
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def read_adapter(directory: str | Path) -> Adapter:
    """Open a LoRA directory, of peft, the original or ours.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if it uses what is not supported here, or a pair is not complete.
    """
    directory = Path(directory)
    settings = read_settings(directory / ADAPTER_CONFIG_FILE)
    for key in ("use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if settings.get(key):
            raise ValueError(f"{directory / ADAPTER_CONFIG_FILE}: {key} is not supported; merge this adapter with peft")
    tensors = open_tensor_file(_existing(directory, ADAPTER_FILES))
    pairs = {}
    for name in tensors:
        stem, mark, _ = name.partition(".lora_A.")
        if mark:
            partner = name.replace(".lora_A.", ".lora_B.")
            if partner not in tensors:
                raise ValueError(f"{directory}: {name} has no {partner}; fetch the adapter again")
            pairs[plain_name(stem) + ".weight"] = (tensors.readers[name], tensors.readers[partner])
    partners = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    others = [name for name in tensors if ".lora_A." not in name and name not in partners]
    if others or not pairs:
        raise ValueError(f"{directory}: {others[0] if others else 'no tensor'} is no part of a LoRA adapter")
    return Adapter(settings, pairs, read_non_lora(directory))


def read_non_lora(directory: Path) -> LazyTensors:
    """Open what was trained beside the adapter.

    Raises:
        FileNotFoundError: if the file is missing: without it the projector's training is lost.
    """
    tensors = open_tensor_file(_existing(directory, NON_LORA_FILES))
    return LazyTensors({plain_name(name): reader for name, reader in tensors.readers.items()})


def read_projector(directory: str | Path) -> LazyTensors:
    """Open `mm_projector.bin` of a directory, or such a file itself, with names as in full weights."""
    path = Path(directory)
    tensors = open_tensor_file(path / PROJECTOR_FILE if path.is_dir() else path)
    return LazyTensors({plain_name(name): reader for name, reader in tensors.readers.items()})


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
    merged = {
        name: functools.partial(_merge_weight, base.readers[name], pair, adapter.scale, dtype, name)
        for name, pair in adapter.pairs.items()
    }
    return base.overlaid({**adapter.replaced.readers, **merged})


def _merge_weight(
    weight: Callable[[], Tensor],
    pair: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    scale: Callable[[int], float],
    dtype: torch.dtype | None,
    name: str,
) -> Tensor:
    base, down, up = weight(), pair[0]().float(), pair[1]().float()
    if base.shape != (up.shape[0], down.shape[1]):
        raise ValueError(
            f"{name} is {tuple(base.shape)} in the base, but {(up.shape[0], down.shape[1])} in the adapter"
        )
    return torch.addmm(base.float(), up, down, alpha=scale(down.shape[0])).to(dtype or base.dtype)


def _existing(directory: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} lacks {' or '.join(names)}; use the directory that training wrote, complete")
