"""What a checkpoint's own files say for its model card: base, prompt template, training, loss curve."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import PLOT_FILE, TRAINING_FILE
from llava.files.json_files import read_settings
from llava.hub.licences import Licence, find_licence
from llava.model.adapter.recorded_base import recorded_base
from llava.model.checkpoint.checkpoint import Layout, detect_layout, find_config
from llava.model.quantization import saved_bits

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RECIPE = (
    "num_train_epochs", "max_steps", "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "optim", "bf16", "fp16", "bits", "seed", "model_max_length",
)  # fmt: skip
_LORA_RECIPE = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "use_dora", "use_rslora", "lora_target_modules")
_NOTHING = (None, False, -1, "")
"""Values of flags that ask for nothing, and are left out of the card."""


@dataclass(frozen=True)
class Training:
    """The last training of a checkpoint, from its run manifest.

    Attributes:
        kind: "lora", "projector" or "full".
        rows: of training data.
        rows_per_step: of all processes.
        data_digest: sha256 over the training data's tokens, labels and image names.
        recipe: flags by name.
        versions: of libraries by name.
    """

    kind: str
    rows: int
    rows_per_step: int
    data_digest: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint is.

    Attributes:
        layout: of its files.
        base: id on the hub or directory of the weights that it was made from; None = not recorded.
        base_revision: commit of the base on the hub; None = not recorded.
        base_fingerprint: of the base's weights; None = not recorded.
        template: conversation template.
        dtype: of the weights in the file, as the config names it; None = unknown.
        bits: 16, or 8 or 4 where the file is quantised.
        is_merged: whether an adapter was merged into full weights.
        training: None where the directory has no run manifest.
        has_loss_curve: whether `loss.png` is in the directory.
        licence: of the base; None = unknown.
    """

    layout: Layout
    base: str | None
    base_revision: str | None
    base_fingerprint: str | None
    template: str | None
    dtype: str | None
    bits: int
    is_merged: bool
    training: Training | None
    has_loss_curve: bool
    licence: Licence | None

    @property
    def base_id(self) -> str | None:
        """The base's id on the hub; None if it is a directory or not recorded."""
        return self.base if self.base and is_hub_id(self.base) else None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `owner/name` and is not a directory here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def read_facts(directory: Path) -> ModelFacts:
    """Read what a complete checkpoint says of itself.

    Raises:
        FileNotFoundError: if the directory holds nothing that can be loaded.
        ValueError: if a file is damaged.
    """
    layout, config = detect_layout(directory), find_config(directory)
    base, revision = recorded_base(directory, config)
    own_card = find_licence(str(directory))
    return ModelFacts(
        layout=layout,
        base=base,
        base_revision=revision,
        base_fingerprint=config and config.base_model_fingerprint,
        template=config and config.conversation_template,
        dtype=config and str(config.dtype).removeprefix("torch."),
        bits=(config and layout in (Layout.FULL, Layout.HF) and saved_bits(config, directory)) or 16,
        is_merged=bool(config and config.merged_adapter_fingerprint),
        training=read_training(directory / TRAINING_FILE),
        has_loss_curve=(directory / PLOT_FILE).is_file(),
        licence=find_licence(base) or own_card,  # the base's directory may be on another machine
    )


def read_training(path: Path) -> Training | None:
    """Read a run manifest; None where there is none, or, with a warning, where it is damaged."""
    if not path.is_file():
        return None
    try:
        manifest = read_settings(path)
        run, flags = manifest["run"], dict(manifest["TrainingArguments"])
        names = (*_RECIPE, *(_LORA_RECIPE if flags.get("lora_enable") else ()))
        recipe = {name: flags[name] for name in names if name in flags and flags[name] not in _NOTHING}
        if "max_steps" in recipe:  # it decides over the epochs
            recipe.pop("num_train_epochs", None)
        versions = {name: str(version) for name, version in manifest.get("versions", {}).items()}
        rows, rows_per_step = int(run["rows"]), int(run["rows_per_step"])
        return Training(str(run["kind"]), rows, rows_per_step, str(run["data_digest"]), recipe, versions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("%s is not a run manifest (%r): the model card says nothing of the training", path, error)
        return None
