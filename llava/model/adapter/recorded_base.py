"""The base that an adapter or projector records, compared with the one it is put on."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from llava.model.adapter.adapter_config import ADAPTER_CONFIG_FILE, read_adapter_settings
from llava.model.checkpoint.lazy_tensors import LazyTensors, fingerprint, is_same_fingerprint
from llava.model.configuration import LlavaConfig

logger = logging.getLogger(__name__)

_CACHED = re.compile(r"models--.+?--(.+)")
"""Name of a model's directory in the hub's cache."""


def recorded_base(directory: Path, config: LlavaConfig | None) -> tuple[str | None, str | None]:
    """Return name or path of the recorded base, and its commit on the hub; None where nothing is recorded."""
    if config is not None and config.base_model_name_or_path:
        return config.base_model_name_or_path, config.base_model_revision
    path = directory / ADAPTER_CONFIG_FILE
    settings = read_adapter_settings(directory) if path.is_file() else {}
    return settings.get("base_model_name_or_path") or None, settings.get("revision") or None


def check_base(directory: Path, name: str | None, base: Path, weights: LazyTensors, expected: str | None) -> str:
    """Return the fingerprint of a base's weights.

    Args:
        directory: of the adapter or projector.
        name: of the base that it records.
        base: directory that is used.
        weights: of that base.
        expected: fingerprint that it records; None = not compared.

    Raises:
        ValueError: if the fingerprints differ.
    """
    found = fingerprint(weights)
    if not is_same_fingerprint(expected, found):
        raise ValueError(
            f"{directory} was trained on {name}, fingerprint {expected}, but {base} has fingerprint {found}; give that "
            "base, or --allow-other-base to use this one"
        )
    return found


def warn_of_other_base(directory: Path, recorded: str | None, named: str | Path, base: Path) -> None:
    """Log a warning where the base has another name than the recorded one, and no fingerprint was recorded.

    Args:
        directory: of the adapter or projector.
        recorded: name or path of the base that it records.
        named: name or path of the base that is used.
        base: directory of that base.
    """
    if recorded is not None and _last_name(recorded) not in {
        _last_name(str(place)) for place in (named, base, base.resolve())
    }:
        logger.warning(
            "%s records %s as its base, but is put on %s; without a recorded fingerprint they can't be compared",
            directory,
            recorded,
            named,
        )


def _last_name(place: str) -> str:
    """Return the last part of a path or hub id, or the model's name in a snapshot of the hub's cache."""
    parts = [part for part in re.split(r"[/\\]", place) if part not in ("", ".")]
    cached = next((match[1] for part in parts if (match := _CACHED.fullmatch(part))), None)
    return (cached or (parts[-1] if parts else place)).lower()
