"""Find the vision tower of a checkpoint: inside its weights, beside it, in the hub's cache, or on the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava.clip_image_processor import PREPROCESSOR_CONFIG_FILE
from llava.files.home_directory import expand_home
from llava.files.json_files import read_settings
from llava.model.checkpoint.hub import find_snapshot, resolve_directory, snapshot_revision
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.config_values import vision_sizes
from llava.model.configuration import CONFIG_FILE, LlavaConfig
from llava.model.vision_tower import TOWER_PREFIX, VIT_L_14_336, released_name

logger = logging.getLogger(__name__)

_TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
_VIT_L_14_336_SHAPES = {
    "vision_model.embeddings.position_embedding.weight": (577, 1024),
    "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
}
"""No other published CLIP has these shapes."""


def attach_tower(
    config: LlavaConfig,
    tensors: LazyTensors,
    vision_tower: str | Path | None,
    near: Sequence[Path],
    cache_dir: str | Path | None = None,
) -> tuple[LazyTensors, LlavaConfig, Path | None]:
    """Find the vision tower and log where: inside the weights, else as `vision_tower` says, else as the config says.

    A name is a path, else a directory beside the checkpoint, else an id in the hub's cache, else one download.
    OpenAI's ViT-L/14-336 needs no `config.json`: it is known by the shapes of its tensors.

    Args:
        config: `mm_vision_config` is filled in.
        tensors: the vision tower's are added.
        vision_tower: directory or hub id; None = as the config names it.
        near: directories beside which a name is looked up.
        cache_dir: the hub's cache; None = the usual one.

    Returns:
        tensors, config, and the directory of `preprocessor_config.json`; None where the model has no vision tower.

    Raises:
        FileNotFoundError: if it is not found, or its sizes are unknown.
        ValueError: if it is not CLIP's.
    """
    inside = any(name.startswith(TOWER_PREFIX) for name in tensors)
    name = expand_home(str(vision_tower or config.mm_vision_tower or ""))
    if not inside and not name:
        return tensors, config, None
    beside = _find_beside(name, near) if name else None
    if inside:
        unneeded = f" (--vision-tower {vision_tower} is not needed)" if vision_tower else ""
        logger.info("vision tower: inside the checkpoint%s", unneeded)
        holder = next((place for place in near if (place / PREPROCESSOR_CONFIG_FILE).is_file()), beside or near[-1])
        config.mm_vision_config = config.mm_vision_config or _tower_sizes(beside, name, tensors)
    else:
        revision = config.mm_vision_tower_revision if vision_tower is None else None
        holder = beside or resolve_directory(name, cache_dir, revision=revision)
        logger.info("vision tower: %s", holder)
        tensors = tensors.overlaid(open_weights(holder).renamed(_name_in_checkpoint).entries)
        config.mm_vision_config = _tower_sizes(holder, name, tensors)
        config.mm_vision_tower_revision = snapshot_revision(holder)
    config.mm_vision_tower = name or None
    config.mm_hidden_size = config.mm_hidden_size or config.mm_vision_config["hidden_size"]
    return tensors, config, holder


def find_tower(name: str, near: Sequence[Path], *, revision: str | None = None) -> Path | None:
    """Return a vision tower's directory by its recorded path or hub id, without a download; None if it is not found."""
    return _find_beside(expand_home(name), near) or find_snapshot(name, revision=revision)


def _find_beside(name: str, near: Sequence[Path]) -> Path | None:
    parents = [each.parent for directory in near for each in (directory, directory.resolve())]  # links resolved too
    places = [Path(name), *(parent / Path(name).name for parent in parents)]
    return next((place for place in places if place.is_dir()), None)


def _name_in_checkpoint(name: str) -> str | None:
    """Return the released name of a tensor of a CLIP directory; None for CLIP's text model."""
    is_part = name.startswith(("vision_model.", *_TOWER_PARTS))
    return released_name(TOWER_PREFIX + name) if is_part else None


def _tower_sizes(directory: Path | None, name: str, tensors: LazyTensors) -> Mapping[str, Any]:
    """Return the vision tower's sizes from its `config.json`, else ViT-L/14-336's if the tensors have its shapes."""
    path = directory / CONFIG_FILE if directory else None
    if path is not None and path.is_file():
        settings = read_settings(path)
        key = "vision_config" if settings.get("vision_config") else "the vision tower"
        settings = settings.get("vision_config") or settings
        kind = settings.get("model_type", "clip_vision_model") if isinstance(settings, Mapping) else settings
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(
                f"{directory} holds a vision tower of type {kind!r}, and LLaVA-1.5's is CLIP; weights trained with "
                "another need the code they were made for, else pass --vision-tower openai/clip-vit-large-patch14-336"
            )
        return vision_sizes(settings, str(path), key)
    expected = {TOWER_PREFIX + part: torch.Size(shape) for part, shape in _VIT_L_14_336_SHAPES.items()}
    if expected == {part: tensors.entries[part].shape for part in expected if part in tensors}:
        return dict(VIT_L_14_336)
    raise FileNotFoundError(
        f"the sizes of vision tower {name!r} are unknown: no {CONFIG_FILE}, and it is not OpenAI's ViT-L/14-336; "
        "pass --vision-tower with its directory"
    )
