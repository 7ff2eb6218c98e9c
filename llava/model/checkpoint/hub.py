"""Resolve the name of a model, a directory or a hub id, to a local directory: from the hub's cache, else downloaded."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from llava.files.home_directory import expand_home
from llava.model.checkpoint.read_tensors import INDEX_ENDING, find_weight_file, missing_shards
from llava.model.configuration import CONFIG_FILE

logger = logging.getLogger(__name__)

WANTED_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja")
SETTINGS_FILES = ("*.json",)
WEIGHT_ENDINGS = (".safetensors", ".bin")
_SAFETENSORS_WEIGHTS = "model*.safetensors"
_PICKLED_WEIGHTS = "pytorch_model*.bin"
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


def resolve_directory(name: str | Path, cache_dir: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Return the directory of a name: the path itself, else a hub id's snapshot, from the cache first.

    Args:
        name: path, whose leading `~` is the home directory, or hub id.
        cache_dir: the hub's cache; None = the usual one.
        revision: commit, branch or tag on the hub, ignored for a path; None = the main branch.

    Raises:
        FileNotFoundError: if there is no such directory and no download (`HF_HUB_OFFLINE` forbids it).
    """
    return _resolve(name, cache_dir, revision, WANTED_FILES, _lacks_weights)


def resolve_config(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the directory of a name as `resolve_directory` does, but look for and download JSON files alone."""
    return _resolve(name, cache_dir, None, SETTINGS_FILES, _lacks_config)


def _resolve(
    name: str | Path,
    cache_dir: str | Path | None,
    revision: str | None,
    wanted: Sequence[str],
    lacking: Callable[[Path], list[str]],
) -> Path:
    name = str(name)
    path = Path(expand_home(name))
    if path.is_dir():
        return path
    shown = f"{name} at revision {revision}" if revision else name
    found = find_snapshot(name, cache_dir, revision)
    if found is not None and not lacking(found):
        return found
    if constants.HF_HUB_OFFLINE:
        missing = f"; its copy in the cache lacks {', '.join(lacking(found))}" if found else ""
        raise FileNotFoundError(
            f"{shown} is neither a directory nor complete in the hub's cache, and HF_HUB_OFFLINE forbids to download "
            f"it{missing}; give the path of a directory, or download it where there is a network"
        )
    try:
        return _download(name, cache_dir, revision, wanted)
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        raise FileNotFoundError(
            f"{shown} is neither a directory nor in the hub's cache, and could not be downloaded ({error}); "
            "give the path of a directory, or download it where there is a network"
        ) from error


def snapshot_revision(directory: str | Path) -> str | None:
    """Return the commit that a directory of the hub's cache holds; None for any other directory."""
    directory = Path(directory)
    is_snapshot = directory.parent.name == "snapshots" and _SNAPSHOT.fullmatch(directory.name)
    return directory.name if is_snapshot else None


def find_snapshot(name: str, cache_dir: str | Path | None = None, revision: str | None = None) -> Path | None:
    """Return a hub id's directory in the hub's cache, complete or not; None if it is not there."""
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _lacks_weights(snapshot: Path) -> list[str]:
    """Return the weight files that an interrupted download left out."""
    entry = find_weight_file(snapshot)
    if entry is not None and entry.name.endswith(INDEX_ENDING):
        return missing_shards(entry)
    has_weights = any(path.suffix in WEIGHT_ENDINGS and path.is_file() for path in snapshot.iterdir())
    return [] if has_weights else ["weights"]


def _lacks_config(snapshot: Path) -> list[str]:
    return [] if (snapshot / CONFIG_FILE).is_file() else [CONFIG_FILE]


def _download(name: str, cache_dir: str | Path | None, revision: str | None, wanted: Sequence[str]) -> Path:
    # One request, not `list_repo_files`, which asks six times in half a minute where there is no network.
    files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()]
    # Many repositories hold the same weights in both formats; one is enough.
    is_doubled = any(fnmatch.fnmatch(file, _SAFETENSORS_WEIGHTS) for file in files)
    logger.info("downloading %s from the hub", name)
    return Path(
        snapshot_download(
            name,
            cache_dir=cache_dir,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=[_PICKLED_WEIGHTS] if is_doubled else None,
        )
    )
