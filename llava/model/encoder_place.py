"""Where the image encoder of a checkpoint comes from: the one rule, `attach_tower`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava.files import read_settings
from llava.image_processing import PREPROCESSOR_CONFIG_FILE
from llava.model.configuration import CONFIG_FILE, LlavaConfig
from llava.model.hub import resolve_directory, snapshot_revision
from llava.model.lazy_tensors import LazyTensors
from llava.model.vision_tower import TOWER_PREFIX, VIT_L_14_336, released_name
from llava.model.weights import open_weights

logger = logging.getLogger(__name__)

_TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
_VIT_L_14_336_SHAPES = {
    "vision_model.embeddings.position_embedding.weight": (577, 1024),
    "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
}
"""No other published CLIP has these."""


def attach_tower(
    config: LlavaConfig,
    tensors: LazyTensors,
    vision_tower: str | Path | None,
    near: Sequence[Path],
    cache_dir: str | Path | None = None,
) -> tuple[LazyTensors, LlavaConfig, Path | None]:
    """Find the image encoder and say where: inside the weights, else where asked, else where the config names it.

    A name that is asked for or recorded is a path, else a directory beside the checkpoint, else an id in the hub's
    cache, else one download. OpenAI's ViT-L/14-336 needs no `config.json`: it is known by its tensors' shapes.

    Args:
        config: of the model; `mm_vision_config` is filled in.
        tensors: of the model; the encoder's are added.
        vision_tower: directory or hub id; None = as the config names it.
        near: directories whose neighbours are looked at.
        cache_dir: the hub's cache; None = the usual one.

    Returns:
        tensors, config, and the directory of `preprocessor_config.json`; None where the model has no encoder.

    Raises:
        FileNotFoundError: if there is none to be found, or its sizes are written nowhere.
    """
    inside = any(name.startswith(TOWER_PREFIX) for name in tensors)
    name = str(vision_tower or config.mm_vision_tower or "")
    if not inside and not name:
        return tensors, config, None
    parents = [each.parent for directory in near for each in (directory, directory.resolve())]  # behind links too
    places = [Path(name), *(parent / Path(name).name for parent in parents)] if name else []
    beside = next((place for place in places if place.is_dir()), None)
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


def _name_in_checkpoint(name: str) -> str | None:
    """Return the released name of a tensor of a CLIP directory; None for those of CLIP's text model."""
    is_part = name.startswith(("vision_model.", *_TOWER_PARTS))
    return released_name(TOWER_PREFIX + name) if is_part else None


def _tower_sizes(directory: Path | None, name: str, tensors: LazyTensors) -> Mapping[str, Any]:
    """Return the encoder's sizes from its `config.json`, else those of ViT-L/14-336 if its tensors have such shapes."""
    path = directory / CONFIG_FILE if directory else None
    if path is not None and path.is_file():
        settings = read_settings(path)
        settings = settings.get("vision_config", settings)
        return {key: settings.get(key, default) for key, default in VIT_L_14_336.items()}
    expected = {TOWER_PREFIX + part: torch.Size(shape) for part, shape in _VIT_L_14_336_SHAPES.items()}
    if expected == {part: tensors.entries[part].shape for part in expected if part in tensors}:
        return dict(VIT_L_14_336)
    raise FileNotFoundError(
        f"the sizes of vision tower {name!r} are unknown: no {CONFIG_FILE}, and it is not OpenAI's ViT-L/14-336; "
        "pass --vision-tower with its directory"
    )
