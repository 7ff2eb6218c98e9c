"""`adapter_config.json` of a LoRA adapter: whether it can be read, its ranks and scales, the modules it targets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.files.json_files import read_settings

ADAPTER_CONFIG_FILE = "adapter_config.json"
_UNSUPPORTED = (
    "fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings of peft that make an adapter something else than W + scale B A or DoRA."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Supported `init_lora_weights`; the others (PiSSA, OLoRA, LoftQ, ...) subtract something from the base first."""
_MOST = 1e6  # rank or alpha
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The first numbered level of a module's name, as peft finds it."""
_LISTS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), (str, "texts")),
    "layers_to_transform": (int, "whole numbers"),
}
"""Settings that hold one value or a list of them: of which type, and its name in messages."""
_EXPRESSIONS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save")


def read_adapter_settings(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, of another kind than LoRA, or uses what is not supported here.
    """
    path = directory / ADAPTER_CONFIG_FILE
    settings = read_settings(path)
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    unsupported = [] if kind == "LORA" else [f"peft_type {kind!r}"]
    unsupported += [key for key in _UNSUPPORTED if settings.get(key)]
    is_plain = isinstance(start, bool | str | None) and start in _PLAIN_STARTS
    unsupported += [] if is_plain else [f"init_lora_weights {start!r:.60}"]
    if unsupported:
        raise ValueError(f"{path}: {unsupported[0]} is not supported; merge this adapter with peft")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not _is_number(value):
            raise ValueError(f"{path}: {key} is {value!r}; write the number that the adapter was trained with there")
    _check_types(settings, path)
    for key in _EXPRESSIONS:
        value = settings.get(key)
        for expression in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"{path}: {key} {expression!r} is not a regular expression ({error}); fetch it again"
                ) from error
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST


def _check_types(settings: Mapping[str, Any], path: Path) -> None:
    def refuse(key: str, expected: str) -> ValueError:
        return ValueError(f"{path}: {key} is {settings[key]!r:.60}, not {expected}; fetch it again")

    for key, (kind, expected) in _LISTS.items():
        value = settings.get(key)
        parts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(part, kind) for part in parts):
            raise refuse(key, expected)
    for key in ("rank_pattern", "alpha_pattern"):
        value = settings.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise refuse(key, "numbers by names of modules")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(settings.get(key), str | None):
            raise refuse(key, "a text")


def rank_of(settings: Mapping[str, Any], module: str) -> int:
    """Return the rank of a module, by its name in the model that was trained."""
    return _by_pattern(settings.get("rank_pattern"), module, settings["r"])


def scale_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor of B A: alpha / r, or alpha / sqrt(r) when rank-stabilised; alpha may differ by module."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def is_targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Tell whether the settings give a linear layer an adapter, by its name in the model that was trained."""
    if _matches(settings.get("exclude_modules"), module) or is_saved(settings, module):
        return False
    targets = settings.get("target_modules")
    if targets == "all-linear":
        return not module.endswith("lm_head")
    return _matches(targets, module) and (isinstance(targets, str) or _is_layer_chosen(settings, module))


def is_saved(settings: Mapping[str, Any], name: str) -> bool:
    """Tell whether a module or tensor, by its name in the trained model, was trained whole (`modules_to_save`)."""
    saved = settings.get("modules_to_save") or ()
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def _matches(modules: str | list[str] | None, module: str) -> bool:
    """Apply peft's rule: a string is a regular expression of whole names, a list holds names or their ends."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in modules or ())


def _is_layer_chosen(settings: Mapping[str, Any], module: str) -> bool:
    chosen, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if chosen is None or chosen == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [re.compile(rf"(?:^|.*?\.){each}\.(\d+)\.") for each in patterns or ()] or [_LAYER_INDEX]
    found = next((match for each in expressions if (match := each.match(module))), None)
    return found is not None and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as peft chooses it."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
