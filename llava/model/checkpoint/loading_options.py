"""Keyword options of `load_pretrained_model`: checked, translated from the original's, or refused as unknown."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.constants import FP8
from llava.files.json_files import read_settings
from llava.model.configuration import LlavaConfig

FLASH_ATTENTION = "flash_attention_2"
ATTENTIONS = ("sdpa", "eager", FLASH_ATTENTION)
HARMLESS = (
    "low_cpu_mem_usage",  # weights always go from the file to the device, one at a time
    "multimodal",  # decided by the files
    "offload_buffers",  # nothing is offloaded to disk
    "offload_folder",
    "offload_state_dict",
    "trust_remote_code",  # no code is taken from a checkpoint
    "use_safetensors",  # read where they are, else the pickle with `weights_only=True`
)
"""Options that change nothing here."""
_ALIASES = {"torch_dtype": "dtype", "load_in_8bit": "load_8bit", "load_in_4bit": "load_4bit"}
_FLASH = "use_flash_attention_2"
_FORMATS = ("load_8bit", "load_4bit", "load_fp8")


class LoadingOptions(NamedTuple):
    """Options of `load_pretrained_model` after its named arguments."""

    dtype: str | torch.dtype | None = None  # of the weights; None = the device's
    load_8bit: bool = False  # also as `load_in_8bit` or in a `quantization_config`
    load_4bit: bool = False  # also as `load_in_4bit` or in a `quantization_config`
    load_fp8: bool = False  # FP8 for the LLM's linear layers
    attn_implementation: str | None = None  # transformers' name; None = SDPA
    vision_tower: str | Path | None = None  # directory or hub id, for weights that come without a vision tower
    allow_other_base: bool = False  # accept a base whose fingerprint differs from the recorded one
    cache_dir: str | Path | None = None  # the hub's cache; None = the usual one
    revision: str | None = None  # commit, branch or tag of `model_path` on the hub; None = its main branch
    max_memory: Mapping[int | str, int | str] | None = None  # by device, for a `device_map` that spreads the model
    overwrite_config: Mapping[str, Any] | None = None  # values for the model's config
    customized_config: str | Path | None = None  # JSON file of such values

    @property
    def bits(self) -> int | str:
        """Bits of the LLM's linear layers: 16, 8, 4 or "fp8"."""
        return FP8 if self.load_fp8 else 4 if self.load_4bit else 8 if self.load_8bit else 16

    def change_config(self, config: LlavaConfig) -> None:
        """Set the values that the caller overwrites.

        Raises:
            FileNotFoundError: if `customized_config` is not a file.
            ValueError: if it is not a JSON object.
        """
        changed = read_settings(Path(self.customized_config)) if self.customized_config else {}
        for key, value in {**changed, **(self.overwrite_config or {})}.items():
            if key not in ("model_type", "architectures", "transformers_version"):
                setattr(config, key, value)


def read_options(
    options: Mapping[str, Any],
    *,
    load_8bit: bool = False,
    load_4bit: bool = False,
    use_flash: bool = False,
    caller: str = "load_pretrained_model",
) -> LoadingOptions:
    """Read the options of a call of `caller`; `HARMLESS` ones have no effect.

    Raises:
        TypeError: if one is unknown, as Python does for an unknown argument.
        ValueError: if two exclude each other, or a value is unknown.
        ImportError: if FlashAttention is requested and not installed.
    """
    options = dict(options)
    use_flash = bool(options.pop(_FLASH, False)) or use_flash
    quantization = options.pop("quantization_config", None)
    wanted = {"load_8bit": load_8bit, "load_4bit": load_4bit, **_quantization(quantization)}
    for name, value in options.items():
        if name in HARMLESS:
            continue
        field = _ALIASES.get(name, name)
        if field not in LoadingOptions._fields:
            known = sorted({*LoadingOptions._fields, *_ALIASES, *HARMLESS, _FLASH, "quantization_config"})
            raise TypeError(
                f"{caller}() got an unexpected keyword argument {name!r}; its further options are {', '.join(known)}"
            )
        wanted[field] = value or wanted.get(field, value)
    if sum(bool(wanted.get(name)) for name in _FORMATS) > 1:
        raise ValueError(f"{', '.join(_FORMATS)} exclude each other; pass one")
    return LoadingOptions(**{**wanted, "attn_implementation": _attention(wanted.get("attn_implementation"), use_flash)})


def _quantization(settings: Any) -> dict[str, bool]:
    """Return the bits that a `BitsAndBytesConfig` requests; its other values have no effect."""
    if settings is None:
        return {}
    values = settings if isinstance(settings, Mapping) else settings.to_dict()
    bits = {"load_8bit": bool(values.get("load_in_8bit")), "load_4bit": bool(values.get("load_in_4bit"))}
    if not any(bits.values()):
        raise ValueError(f"quantization_config is {json.dumps(values, default=str)}; only load_in_4bit or load_in_8bit")
    if bits["load_4bit"] and values.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise ValueError(f"bnb_4bit_quant_type is {values['bnb_4bit_quant_type']!r}; only 'nf4' is supported")
    return {name: True for name, is_wanted in bits.items() if is_wanted}


def _attention(name: str | None, use_flash: bool) -> str:
    name = FLASH_ATTENTION if use_flash else name or "sdpa"
    if name not in ATTENTIONS:
        raise ValueError(f"attn_implementation is {name!r}; choose {', '.join(ATTENTIONS)}")
    if name == FLASH_ATTENTION and importlib.util.find_spec("flash_attn") is None:
        raise ImportError("flash_attention_2 needs the package flash-attn; install it, or leave it out for SDPA")
    return name
