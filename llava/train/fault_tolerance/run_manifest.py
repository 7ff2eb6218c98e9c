"""Run manifest: what `training.json` says of a run, and whether a run may resume from a checkpoint of another."""

from __future__ import annotations

import hashlib
import json
import platform
from array import array
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llava.data.records import EncodedRecord
from llava.files.json_files import parse_json
from llava.image_files.decode import IMAGE_RULES
from llava.model.checkpoint.lazy_tensors import is_same_fingerprint
from llava.train.flags.arguments import zero_stage
from llava.train.flags.training_arguments import TrainingArguments

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors")

DECISIVE = {
    "run": ("data_digest", "rows_per_step", "base_model_fingerprint", "kind", "zero_stage"),
    "ModelArguments": ("freeze_backbone", "pretrain_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
    "DataArguments": ("image_aspect_ratio",),
    "TrainingArguments": (
        "seed", "data_seed", "group_by_modality_length", "train_sampling_strategy", "dataloader_drop_last",
        "freeze_mm_mlp_adapter", "lora_enable", "lora_r", "lora_alpha", "lora_weight_path", "bits", "bf16", "fp16",
        "base_dtype", "optim", "lora_target_modules", "lora_bias", "use_dora", "use_rslora", "share_image_prefix",
    ),
}  # fmt: skip
"""Entries that must not change on resume: the data, their order, the model, and its trainable parameters."""

RESTORED = (
    "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon",
)  # fmt: skip
"""Flags whose former values are restored with the state of the optimizer and the schedule."""

FREE = (
    "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm",
    "lora_dropout", "per_device_train_batch_size", "gradient_accumulation_steps", "compile_layers", "fuse_lora",
)  # fmt: skip
"""Flags that apply at once when they change: the run resumes, but not bit for bit as if it had never stopped."""


def run_manifest(
    records: Sequence[EncodedRecord], *, kind: str, base_fingerprint: str, training_args: TrainingArguments
) -> dict[str, Any]:
    """Return a run's part of the manifest that its flags don't show.

    Args:
        records: training data, in order.
        kind: "lora", "projector" or "full".
        base_fingerprint: of the weights that it starts from.
        training_args: flags.
    """
    rows = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return {
        "data_digest": digest_records(records),
        "rows": len(records),
        "rows_per_step": rows,
        "processes": training_args.world_size,
        "zero_stage": zero_stage(training_args.deepspeed),
        "kind": kind,
        "base_model_fingerprint": base_fingerprint,
        "image_rules": IMAGE_RULES,
    }


def digest_records(records: Sequence[EncodedRecord]) -> str:
    """Return a sha256 over token ids, labels and the names of the images without their folder."""
    digest = hashlib.sha256()
    for record in records:
        names = "\0".join(path.name for path in record.images)
        digest.update(f"{len(record.input_ids)} {names}\n".encode())
        digest.update(array("q", record.input_ids).tobytes())
        digest.update(array("q", record.labels).tobytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that compute."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def add_run_manifest(flags: str, run: Mapping[str, Any]) -> str:
    """Return the text of `training.json`: the flags (JSON), `run_manifest` and the libraries' versions."""
    manifest = {**parse_json(flags), "run": dict(run), "versions": library_versions()}
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def compare_runs(former: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two contents of `training.json` by the entries that both have.

    Returns:
        differences that forbid to resume, and those that don't, each with its effect.
    """
    refused = [
        f"{key} was {before}, now {after}"
        for group, keys in DECISIVE.items()
        for key, before, after in _differences(former, now, group, keys)
    ]
    processes = _differences(former, now, "run", ("processes",))
    warned = []
    for key, before, after in _differences(former, now, "TrainingArguments", RESTORED):
        if None in (before, after):  # a learning rate of its own makes a parameter group of its own
            refused.append(f"{key} was {before}, now {after}")
        else:
            warned.append(f"{key} {before} stays, {after} has no effect")
    warned += [
        f"{key} was {before}, now {after}"
        for key, before, after in _differences(former, now, "TrainingArguments", FREE)
    ]
    warned += [
        f"{key} was {before}, now {after}" for key, before, after in _differences(former, now, "versions", LIBRARIES)
    ]
    for key, before, after in processes:
        (refused if now["run"]["zero_stage"] else warned).append(f"{key} was {before}, now {after}")
    return refused, warned


def _differences(
    former: Mapping[str, Any], now: Mapping[str, Any], group: str, keys: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    one, two = former.get(group, {}), now.get(group, {})
    return [(key, one[key], two[key]) for key in keys if key in one and key in two and _differ(key, one[key], two[key])]


def _differ(key: str, before: Any, after: Any) -> bool:
    is_fingerprint = key == "base_model_fingerprint" and isinstance(before, str) and isinstance(after, str)
    return not is_same_fingerprint(before, after) if is_fingerprint else before != after
