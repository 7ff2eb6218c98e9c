"""What a run is, written beside its weights, and whether a checkpoint belongs to the run that would go on from it."""

from __future__ import annotations

import hashlib
import json
import platform
from array import array
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llava.data.records import EncodedRecord
from llava.train.arguments import TrainingArguments, zero_stage

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors")

DECISIVE = {
    "run": ("data_digest", "rows_per_step", "base_model_fingerprint", "kind", "zero_stage"),
    "ModelArguments": ("freeze_backbone", "pretrain_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
    "DataArguments": ("image_aspect_ratio",),
    "TrainingArguments": (
        "seed", "data_seed", "group_by_modality_length", "train_sampling_strategy", "dataloader_drop_last",
        "freeze_mm_mlp_adapter", "lora_enable", "lora_r", "lora_alpha", "lora_weight_path", "bits", "bf16", "fp16",
        "optim", "lora_target_modules", "lora_bias", "use_dora", "use_rslora", "share_image_prefix",
    ),
}  # fmt: skip
"""What a run can't go on with when it is another: the data, their order, the model, and what of it learns."""

KEPT_BY_OPTIMIZER = (
    "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon",
)  # fmt: skip
"""Flags whose values come back with the optimizer's and the schedule's state."""

FREE = (
    "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm",
    "lora_dropout", "per_device_train_batch_size", "gradient_accumulation_steps", "compile_layers", "fuse_lora",
)  # fmt: skip
"""Flags that apply at once when they change: the run goes on, but not as the one that was never stopped."""


def run_facts(
    records: Sequence[EncodedRecord], *, kind: str, base_fingerprint: str, training_args: TrainingArguments
) -> dict[str, Any]:
    """Return what flags don't tell about a run.

    Args:
        records: that it learns from, in order.
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
    }


def digest_records(records: Sequence[EncodedRecord]) -> str:
    """Return a sha256 over ids, labels and the names of the images, whatever folder they are in."""
    digest = hashlib.sha256()
    for record in records:
        names = "\0".join(path.name for path in record.images)
        digest.update(f"{len(record.input_ids)} {names}\n".encode())
        digest.update(array("q", record.input_ids).tobytes())
        digest.update(array("q", record.labels).tobytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute, those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def add_to_record(training: str, facts: Mapping[str, Any]) -> str:
    """Return the text of `training.json` with `run_facts` and the libraries' versions beside the flags."""
    record = {**json.loads(training), "run": dict(facts), "versions": library_versions()}
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def compare_runs(former: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two contents of `training.json`; what only one of them knows is not compared.

    Returns:
        differences with which a run can't go on, and those with which it can, each with what becomes of it.
    """
    refused = [
        f"{key} was {before}, now {after}"
        for group, keys in DECISIVE.items()
        for key, before, after in _differences(former, now, group, keys)
    ]
    processes = _differences(former, now, "run", ("processes",))
    warned = []
    for key, before, after in _differences(former, now, "TrainingArguments", KEPT_BY_OPTIMIZER):
        if None in (before, after):  # a rate of its own makes a group of parameters of its own
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
    return [(key, one[key], two[key]) for key in keys if key in one and key in two and one[key] != two[key]]
