"""The flags of training: the original's, every one of `transformers.TrainingArguments`, and a few more."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn

from llava.model.devices import best_device, default_dtype

_FIELDS = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"

RENAMED_FLAGS = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": f"{_CHECKPOINTING}_kwargs",
}
"""Names that some versions of transformers use, and what the installed one calls them."""


def _flag(default: object, help_text: str) -> object:
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """Which model, and what of it learns. The checkpoint describes itself; a flag that differs from it is an error."""

    model_name_or_path: str = _flag("liuhaotian/llava-v1.5-7b", "Directory or hub id of the weights to start from.")
    version: str | None = _flag(None, "Prompt template; default: the checkpoint's, else v1.")
    freeze_backbone: bool = _flag(False, "Keep the LLM as it is.")
    tune_mm_mlp_adapter: bool = _flag(False, "Train the projector alone (pretraining).")
    vision_tower: str | None = _flag(
        None, "Directory or hub id of the image encoder, for weights that come without one."
    )
    mm_vision_select_layer: int | None = _flag(None, "Layer of the encoder whose output is read; default -2.")
    mm_vision_select_feature: str | None = _flag(None, "patch (default), or cls_patch to keep the class token.")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin to start from.")
    mm_projector_type: str | None = _flag(None, "linear or mlp2x_gelu (default for weights without a projector).")
    mm_patch_merge_type: str | None = _flag(None, "flat, the only one.")
    unfreeze_mm_vision_tower: bool = _flag(False, "Train the image encoder too.")
    mm_use_im_start_end: bool = _flag(False, "As in the original; LLaVA-1.5 has no such tokens, so True is refused.")
    mm_use_im_patch_token: bool = _flag(False, "As in the original; LLaVA-1.5 has no such token, so True is refused.")


@dataclass
class DataArguments:
    """Which data."""

    data_path: str | None = _flag(None, "JSON list or jsonl of LLaVA records; several with commas between them.")
    image_folder: str | None = _flag(None, "Folder of the images.")
    image_aspect_ratio: str | None = _flag(None, "pad, square or anyres; default: the checkpoint's, else pad.")
    lazy_preprocess: bool = _flag(True, "Images are always read when needed; False is refused.")
    is_multimodal: bool = _flag(True, "As in the original; text-only rows need no flag, so False is refused.")
    on_bad_row: str = _flag(
        "error", "error: list rows that can't be used and stop; skip: list them and leave them out."
    )
    skip_data_check: bool = _flag(
        False, "Don't decode images and look for duplicates before training; unusable records are found all the same."
    )
    eval_data_path: str | None = _flag(None, "Records to validate on, as --data_path.")
    eval_image_folder: str | None = _flag(None, "Folder of their images; default: --image_folder.")
    val_share: float | None = _flag(None, "Share of the images (0 to 1) held out of --data_path to validate on.")
    val_seed: int = _flag(0, "Which images --val_share takes.")
    eval_max_questions: int = _flag(1000, "Most questions answered in a validation; 0: loss alone.")
    eval_max_new_tokens: int = _flag(64, "Longest answer; questions with longer true answers count for the loss alone.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it learns."""

    output_dir: str | None = _flag(None, "Where checkpoints and the result go.")
    bf16: bool | None = _flag(
        None, "Compute in bf16; default: where the device does (fp16 on older GPUs, fp32 on CPU)."
    )
    fp16: bool | None = _flag(None, "Compute in fp16.")
    warmup_ratio: float | None = _flag(None, "Share of the steps over which the learning rate rises.")
    remove_unused_columns: bool = _flag(False, "Stays False: the batches hold images.")
    cache_dir: str | None = _flag(None, "Hub cache to use, as HF_HUB_CACHE.")
    model_max_length: int = _flag(2048, "Longest row in tokens, image patches included.")
    freeze_mm_mlp_adapter: bool = _flag(False, "Keep the projector as it is.")
    mm_projector_lr: float | None = _flag(None, "Learning rate of the projector; default: --learning_rate.")
    group_by_modality_length: bool = _flag(
        False, "Batches of one modality and similar length; rows that share image prefixes come together instead."
    )
    share_image_prefix: bool = _flag(
        True, "Compute what rows of one image have in common once a batch, for all of them."
    )
    compile_layers: str = _flag(
        "auto", "on: torch.compile for the LLM's layers; auto: on CUDA, where it works; or off."
    )
    fuse_lora: str = _flag("auto", "on: adapters of one input as one product; auto: where layers are compiled; or off.")
    checkpoint_layers: str = _flag(
        "auto",
        "With --gradient_checkpointing: how many of the LLM's layers are computed again: auto (on CUDA as few as "
        "memory allows), all, or a number.",
    )
    bits: int = _flag(16, "16, or 8 or 4 to hold the LLM quantised (bitsandbytes) under LoRA.")
    double_quant: bool = _flag(True, "With --bits 4: quantise the scales too; False is refused.")
    quant_type: str = _flag("nf4", "With --bits 4: nf4, the only one.")
    lora_enable: bool = _flag(False, "Train LoRA adapters on the LLM's linear layers instead of the layers.")
    lora_r: int = _flag(64, "Rank of the adapters.")
    lora_alpha: int = _flag(16, "Their products are scaled by alpha / r.")
    lora_dropout: float = _flag(0.05, "Share of an adapter's inputs dropped in training.")
    lora_weight_path: str = _flag("", "LoRA directory to continue from.")
    lora_target_modules: str | None = _flag(
        None, "Layers that get adapters, such as q_proj,v_proj; default: all linear layers of the LLM."
    )
    use_dora: bool = _flag(False, "With --lora_enable: DoRA, adapters with a learnt length of each row of the weights.")
    use_rslora: bool = _flag(False, "With --lora_enable: products scaled by alpha / sqrt(r) instead.")
    mm_vision_tower_lr: float | None = _flag(None, "Learning rate of the image encoder; default: --learning_rate.")
    early_stopping_patience: int | None = _flag(
        None, "End after so many validations without a better --metric_for_best_model; default: never."
    )
    lora_bias: str = _flag("none", "none, lora_only or all; Llama has no biases, so they give the same.")
    resume_from_checkpoint: str | None = _flag(
        None, "auto (default): the newest whole checkpoint of --output_dir; none: start anew; or a checkpoint's path."
    )
    sanity_check: int = _flag(0, "Learn the first batch alone for so many steps before training; its loss must fall.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir is missing; say where checkpoints and the result go")
        zero_stage(self.deepspeed)  # a file that can't be read is named here, before transformers looks at it
        if best_device().type == "cpu":
            self.use_cpu = True  # else DeepSpeed's processes don't find each other without an accelerator
        if self.bf16 is None and self.fp16 is None:
            dtype = default_dtype("cpu" if self.use_cpu else best_device())
            self.bf16, self.fp16 = dtype is torch.bfloat16, dtype is torch.float16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.warmup_ratio is not None:
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        if getattr(self, _CHECKPOINTING) and not getattr(self, f"{_CHECKPOINTING}_kwargs"):
            setattr(self, f"{_CHECKPOINTING}_kwargs", {"use_reentrant": False})
        self.logging_nan_inf_filter = False  # it asks the device for each batch; the run stops at such a loss anyway
        chooses_copies = self.accelerator_config is not None
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"
        if not chooses_copies:  # else batches would wait for the update before them
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    @property
    def device(self) -> torch.device:
        """This process's device; the CPU without an index, which torch can't load tensors to."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, at most 1: dealt out to several, a model has no weights of its own that packs need."""
        return min(1, super().n_gpu)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether blocks are computed again in the backward pass, whatever this version calls the flag."""
        return bool(getattr(self, _CHECKPOINTING))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights that don't learn."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def zero_stage(config: str | dict | None) -> int:
    """Return the ZeRO stage of a DeepSpeed config (its path or content), 0 without one.

    Raises:
        ValueError: if the file is missing or no JSON.
    """
    return _zero_settings(config).get("stage", 0)


def is_offloaded(config: str | dict | None) -> bool:
    """Tell whether a DeepSpeed config keeps the optimizer's state in the CPU's memory.

    Raises:
        ValueError: if the file is missing or no JSON.
    """
    return _zero_settings(config).get("offload_optimizer", {}).get("device", "none") != "none"


def _zero_settings(config: str | dict | None) -> dict:
    if not config:
        return {}
    if not isinstance(config, dict):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--deepspeed {config} can't be read ({error}); use scripts/zero2.json") from error
    return config.get("zero_optimization", {})


def enable_activation_checkpointing(model: nn.Module, training: TrainingArguments) -> None:
    """Let a model compute blocks again in the backward pass, whatever this version of transformers calls it."""
    settings = {f"{_CHECKPOINTING}_kwargs": getattr(training, f"{_CHECKPOINTING}_kwargs")}
    getattr(model, f"{_CHECKPOINTING}_enable")(**settings)


def as_json(*arguments: object) -> str:
    """Return argument groups as one JSON text, for the record beside the weights."""
    groups = {}
    for group in arguments:
        values = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        groups[type(group).__name__] = values
    return json.dumps(groups, indent=2, sort_keys=True, default=str) + "\n"
