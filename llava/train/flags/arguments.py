"""Training flags: the original's, and those added to `transformers.TrainingArguments`; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from llava.data.table.options import TableOptions, parse_table_values
from llava.files.home_directory import expand_homes
from llava.files.install_command import install_command
from llava.inference.distributed import read_rank
from llava.train.flags.json_flags import JSON_FILE_FLAGS, JSON_FLAGS, read_json_flag

_DEEPSPEED_SECTIONS = ("fp16", "bf16", "optimizer", "scheduler")
_OFFLOAD_SECTIONS = ("offload_optimizer", "offload_param")
MODEL_PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter")
DATA_FILES = ("data_path", "eval_data_path")
IMAGE_FOLDERS = ("image_folder", "eval_image_folder")
_TRAINING_PATHS = ("output_dir", "cache_dir", "lora_weight_path", "resume_from_checkpoint", *JSON_FILE_FLAGS)

AUTOMATIC, START_OVER = ("", "auto", "true"), ("none", "false")
"""Values of `--resume_from_checkpoint`, in lower case, that name no checkpoint."""

_RENAMED_FLAGS = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}


def checkpointing_flag(known: Collection[str]) -> str:
    """Return the flag of activation checkpointing among those of the installed version of transformers."""
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"


def renamed_flags(known: Collection[str]) -> dict[str, str]:
    """Return flags of other versions of transformers, and their name in the installed one, whose flags are `known`."""
    name = checkpointing_flag(known)
    both = {
        f"{old}_checkpointing{end}": f"{name}{end}" for old in ("gradient", "activation") for end in ("", "_kwargs")
    }
    return _RENAMED_FLAGS | both


def _flag(default: object, help_text: str) -> object:
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """Which model, and which parts are trainable; a flag that contradicts the checkpoint's config is refused."""

    model_name_or_path: str = _flag("liuhaotian/llava-v1.5-7b", "Checkpoint to start from: directory or hub id.")
    version: str | None = _flag(None, "Prompt template; default: the checkpoint's, else v1.")
    freeze_backbone: bool = _flag(False, "Keep the LLM frozen.")
    tune_mm_mlp_adapter: bool = _flag(False, "Train the projector alone (pretraining).")
    vision_tower: str | None = _flag(None, "Vision tower for checkpoints without one: directory or hub id.")
    mm_vision_select_layer: int | None = _flag(None, "Layer of the vision tower whose output is used; default -2.")
    mm_vision_select_feature: str | None = _flag(None, "patch (default), or cls_patch to keep the class token.")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "Pretrained projector to start from: mm_projector.bin.")
    mm_projector_type: str | None = _flag(None, "linear or mlp2x_gelu (default for checkpoints without a projector).")
    mm_patch_merge_type: str | None = _flag(None, "flat, the only type.")
    unfreeze_mm_vision_tower: bool = _flag(False, "Train the vision tower too.")
    mm_use_im_start_end: bool | None = _flag(None, "<im_start> and <im_end> around images; default: as the checkpoint.")
    mm_use_im_patch_token: bool | None = _flag(None, "<im_patch> in the vocabulary; default: as the checkpoint.")

    def __post_init__(self) -> None:
        expand_homes(self, *MODEL_PATHS)


@dataclass
class DataArguments:
    """Which data, and what to do about unusable rows."""

    data_path: str | None = _flag(
        None, "LLaVA records (JSON list, jsonl) or a table (.csv, .xlsx, .parquet); several separated by commas."
    )
    image_folder: str | None = _flag(None, "Folder of the images.")
    image_aspect_ratio: str | None = _flag(None, "pad, square or anyres; default: the checkpoint's, else pad.")
    lazy_preprocess: bool = _flag(True, "Always True: images are read when needed.")
    is_multimodal: bool = _flag(True, "Always True: text-only rows need no flag.")
    on_bad_row: str = _flag("error", "error: list unusable rows and stop; skip: list them and leave them out.")
    skip_data_check: bool = _flag(False, "Don't decode the images before training and don't look for duplicates.")
    eval_data_path: str | None = _flag(None, "Validation records, in the format of --data_path.")
    eval_image_folder: str | None = _flag(None, "Folder of the validation images; default: --image_folder.")
    val_share: float | None = _flag(None, "Share of the images (0 to 1) held out of --data_path for validation.")
    val_seed: int = _flag(0, "Seed that chooses the images of --val_share.")
    eval_max_questions: int = _flag(1000, "Questions answered in each validation; 0: loss only.")
    eval_max_new_tokens: int = _flag(64, "Tokens of an answer; a longer true answer counts for the loss only.")
    image_column: str | None = field(
        default=None,
        metadata={
            "aliases": ["--image_id_column"],
            "help": "Of a table: column with file names or ids of images, or images; default: image_id, image or "
            "file_name.",
        },
    )
    question_column: str | None = _flag(None, "Of a table: column with the questions; default: question.")
    question_id_column: str | None = _flag(None, "Of a table: column with the ids of the questions.")
    answer_column: list[str] | None = field(
        default=None, metadata={"help": "Of a table: column or columns with the answers; default: answer, answers."}
    )
    image_name: str | None = _flag(None, "Of a table: file name of an image, {id} standing for the image column.")
    delimiter: str | None = _flag(None, "Of a table in a text file: character between columns; default: found.")
    encoding: str | None = _flag(None, "Of a table in a text file: its encoding, such as cp1251; default: utf-8.")
    sheet: str | None = _flag(None, "Of a table in a spreadsheet: name of the sheet; default: the first.")

    def __post_init__(self) -> None:
        expand_homes(self, *IMAGE_FOLDERS)  # DATA_FILES: by `split_paths`

    def table_options(self) -> TableOptions:
        """Return how the tables among the data files are read.

        Raises:
            ValueError: if a flag has a value that no table can have.
        """
        return parse_table_values(vars(self))


@dataclass
class TrainingFlags:
    """How it is trained: LoRA, quantization, packs, fault tolerance, and other defaults for flags of transformers."""

    output_dir: str | None = _flag(None, "Directory of checkpoints and of the result.")
    bf16: bool | None = _flag(None, "Compute in bf16; default: on GPUs that support it (else fp16; fp32 on CPU).")
    fp16: bool | None = _flag(None, "Compute in fp16.")
    warmup_ratio: float | None = _flag(None, "Share of the steps over which the learning rate rises.")
    remove_unused_columns: bool = _flag(False, "Always False: the batches hold images.")
    cache_dir: str | None = _flag(None, "Hub cache, as HF_HUB_CACHE.")
    model_max_length: int = _flag(2048, "Longest row in tokens, image patches included.")
    freeze_mm_mlp_adapter: bool = _flag(False, "Keep the projector frozen.")
    mm_projector_lr: float | None = _flag(None, "Learning rate of the projector; default: --learning_rate.")
    group_by_modality_length: bool = _flag(
        False, "Batches of one modality and similar length, unless image prefixes are shared."
    )
    share_image_prefix: bool = _flag(True, "Compute the image prefix once per batch for all rows of an image (packs).")
    compile_layers: str = _flag("auto", "torch.compile for the LLM's layers: on, auto (on CUDA, if it works), or off.")
    fuse_lora: str = _flag("auto", "One matrix product for adapters of one input: on, auto (if compiled), or off.")
    checkpoint_layers: str = _flag(
        "auto", "Layers with --gradient_checkpointing: auto (on CUDA what memory needs), all, or N."
    )
    fit: str = _flag("off", "auto: on CUDA a micro-batch that fits the memory, the rows per step unchanged; off.")
    bits: int = _flag(16, "16, or 8 or 4 for a quantized LLM (bitsandbytes) under LoRA.")
    base_dtype: str = _flag("auto", "fp8: the frozen LLM in FP8 under LoRA, faster on Ada, Hopper and newer; auto.")
    double_quant: bool = _flag(True, "With --bits 4: always True, the scales are quantized too.")
    quant_type: str = _flag("nf4", "With --bits 4: nf4, the only type.")
    lora_enable: bool = _flag(False, "Train LoRA adapters on the LLM's linear layers instead of the layers.")
    lora_r: int = _flag(64, "Rank of the adapters.")
    lora_alpha: int = _flag(16, "The adapters' products are scaled by alpha / r.")
    lora_dropout: float = _flag(0.05, "Dropout on the adapters' inputs.")
    lora_weight_path: str = _flag("", "LoRA directory whose adapters are trained further.")
    lora_target_modules: str | None = _flag(
        None, "Layers with adapters, such as q_proj,v_proj; default: all linear layers."
    )
    use_dora: bool = _flag(False, "With --lora_enable: DoRA, which also learns the length of each weight row.")
    use_rslora: bool = _flag(False, "With --lora_enable: scale by alpha / sqrt(r) instead.")
    mm_vision_tower_lr: float | None = _flag(None, "Learning rate of the vision tower; default: --learning_rate.")
    early_stopping_patience: int | None = _flag(
        None, "Validations without a better --metric_for_best_model before the end."
    )
    lora_bias: str = _flag("none", "none, lora_only or all; Llama has no biases, so they give the same.")
    resume_from_checkpoint: str | None = _flag(
        None, "auto (default): newest complete checkpoint; none: start over; or a path."
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Log to these besides train_log.jsonl: none, all (whatever is installed), or names."},
    )
    logging_dir: str | None = _flag(None, "Directory of TensorBoard's files; default: runs, in --output_dir.")
    sanity_check: int = _flag(0, "Overfit check: steps on the first batch alone, whose loss must fall; 0: none.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir is missing; say where checkpoints and the result go")
        expand_homes(self, *_TRAINING_PATHS)
        self._check_json()

    def _check_json(self) -> None:
        """Read the JSON flags, so that errors name the flag before transformers reads them.

        Raises:
            ValueError: if one can't be read, or DeepSpeed is asked for and not installed.
        """
        for flag in JSON_FLAGS:
            read_json_flag(flag, getattr(self, flag, None))
        if self.deepspeed:
            if "zero_optimization" not in read_json_flag("deepspeed", self.deepspeed):
                raise ValueError(f"--deepspeed {self.deepspeed} has no zero_optimization; use scripts/zero2.json")
            zero_stage(self.deepspeed)
            _check_sections(self.deepspeed)
            if importlib.util.find_spec("deepspeed") is None:
                raise ValueError(
                    f"--deepspeed {self.deepspeed} needs DeepSpeed; run: {install_command('train')}, or leave it out"
                )


def zero_stage(config: str | dict | None) -> int:
    """Return the ZeRO stage of a DeepSpeed config (its path or content), 0 without one.

    Raises:
        ValueError: if the file is missing or not JSON, or the stage is not a number from 0 to 3.
    """
    stage = _zero_settings(config).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"--deepspeed {config} has the stage {stage!r}; choose 0, 1, 2 or 3, as scripts/zero2.json")
    return stage


def is_offloaded(config: str | dict | None) -> bool:
    """Whether a DeepSpeed config offloads the optimizer's state to the CPU.

    Raises:
        ValueError: if the file is missing or not JSON.
    """
    return (_zero_settings(config).get("offload_optimizer") or {}).get("device", "none") != "none"


def _check_sections(config: str | dict) -> None:
    """Refuse a section of a DeepSpeed config that is not an object, for which accelerate raises an AttributeError.

    Raises:
        ValueError: naming the section and its value.
    """
    content = read_json_flag("deepspeed", config)
    for place, names in (("", _DEEPSPEED_SECTIONS), ("zero_optimization", _OFFLOAD_SECTIONS)):
        values = content[place] if place else content
        for name in names:
            if not isinstance(values.get(name, {}), dict):
                key = f"{place}.{name}".lstrip(".")
                example = '{"device": "cpu"}' if place else '{"enabled": "auto"}'
                raise ValueError(
                    f"--deepspeed {config} has {json.dumps(values[name])} under {key}; write an object there, such as "
                    f"{example}, or use scripts/zero3_offload.json"
                )


def _zero_settings(config: str | dict | None) -> dict[str, Any]:
    settings = read_json_flag("deepspeed", config).get("zero_optimization", {})
    if not isinstance(settings, dict):
        raise ValueError(f"--deepspeed {config} has no object under zero_optimization; use scripts/zero2.json")
    return settings


def output_kind(model: ModelArguments, training: TrainingFlags) -> str:
    """Return what a run writes: "lora" (adapters), "projector" or "full" (all weights)."""
    return "lora" if training.lora_enable else "projector" if model.tune_mm_mlp_adapter else "full"


def is_first_process() -> bool:
    """Whether this process reports and writes: rank 0, or the only one."""
    return read_rank().rank == 0


def as_json(*arguments: object) -> str:
    """Return the flags as JSON text, for `training.json`."""
    groups = {}
    for group in arguments:
        values = group.to_dict() if isinstance(group, TrainingFlags) else dataclasses.asdict(group)
        groups[type(group).__name__] = values
    return json.dumps(groups, indent=2, sort_keys=True, default=str) + "\n"
