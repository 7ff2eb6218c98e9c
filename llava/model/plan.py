"""Memory plan of a run: bytes needed on each GPU, bytes available, and the nearest setup that fits.

`python -m llava.model.plan --train --data data.json` prints it; training prints the same at its start. The estimate is
in `llava.model.planner`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import FP8
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import report_error

# What computes is imported where it is used: a wrong flag and --help need not wait for torch.
if TYPE_CHECKING:
    from llava.model.configuration import LlavaConfig
    from llava.model.memory import ModelSizes
    from llava.model.planner.setups import Inference, Training
    from llava.model.planner.workload import Workload
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

FITS, TOO_LARGE, WRONG_USAGE = 0, 1, 2
_KINDS = ("lora", "full", "projector")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.model.plan",
        "Print the GPU memory that training or inference needs, and a setup that fits.",
        """examples:
  python -m llava.model.plan --train --data playground/data_train/data.json --gpu-memory 24
  python -m llava.model.plan --train --questions-per-image 4.2 --batch 16 --gpu-memory 24
  python -m llava.model.plan --table
  python -m llava.model.plan --model-path llava_merged_model --infer --bits 4 --gpu-memory 8
exit code: 0 it fits (or no GPU was named), 1 it does not fit, 2 wrong usage""",
    )
    add = parser.add_argument
    add("--model-path", help="directory or hub id; config and tokenizer are read, not weights (default: sizes of 7B)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--train", action="store_true", help="plan training (the default)")
    task.add_argument("--infer", action="store_true", help="plan inference")
    task.add_argument("--table", action="store_true", help="Markdown table of GPUs: flags, memory, hours of the recipe")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="FILE", help="training records, as --data_path of training; their packs count")
    data.add_argument("--questions-per-image", type=float, metavar="N", help="mean of the data (default: 4.25)")
    data.add_argument("--no-sharing", action="store_true", help="rows of --length, as with --share_image_prefix False")
    add("--bits", type=int, choices=(16, 8, 4), default=16, help="bits of the LLM's weights (default: %(default)s)")
    add("--fp8", action="store_true", help="FP8 weights, with --infer")
    add("--batch", type=int, help="batch size on each GPU (default: 16 in training, 1 in inference)")
    add("--accumulation", type=int, default=1, help="batches of a training step (default: %(default)s)")
    add("--length", type=int, help="longest row or prompt in positions, patches too (default: 640)")
    add("--max-new-tokens", type=int, default=128, help="tokens of the longest answer (default: %(default)s)")
    add("--kind", choices=_KINDS, default="lora", help="trainable parameters (default: %(default)s)")
    add("--lora-r", type=int, default=128, help="rank of the adapters (default: %(default)s)")
    add("--lora-dropout", type=float, default=0.05, help="LoRA dropout, 0 to 1 (default: %(default)s)")
    add("--train-tower", action="store_true", help="the vision tower is trained too")
    add("--no-checkpointing", action="store_true", help="without activation checkpointing")
    add("--checkpoint-layers", default="auto", help="auto (what memory needs), all or N (default: %(default)s)")
    add("--before-ampere", action="store_true", help="the GPU has no FlexAttention (T4, V100, RTX 20xx)")
    add("--zero", type=int, choices=(0, 2, 3), default=2, help="ZeRO stage, 0: no DeepSpeed (default: %(default)s)")
    add("--offload", action="store_true", help="DeepSpeed keeps the optimizer in CPU memory")
    add("--gpus", type=int, default=1, help="number of GPUs (default: %(default)s)")
    add("--gpu-memory", type=float, metavar="GB", help="memory of each GPU in GB (default: what is free here)")
    add("--json", type=Path, metavar="FILE", help="also write the plan to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a memory plan and return the exit code."""
    parser = build_parser()
    options = expand_homes(parser.parse_args(argv), "model_path", "json")
    _check_options(parser, options)
    from llava.model.planner.estimate import describe_plan, fits, plan_device
    from llava.model.planner.gpus import describe_gpus

    try:
        sizes = sizes_of(options.model_path)
        run = _inference(options) if options.infer else _training(options, sizes)
    except (OSError, ValueError) as error:
        report_error(error)
        return WRONG_USAGE
    if options.table:
        print(describe_gpus(sizes, run))
        return FITS
    available = round(options.gpu_memory * 1e9) if options.gpu_memory else _free_memory()
    task, model = "inference" if options.infer else "training", options.model_path or "LLaVA-1.5-7B"
    print(f"{task} {model}\n{describe_plan(sizes, run, available)}")
    if options.json:
        setup = {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "workload"}
        plan = {"setup": setup, "bytes": plan_device(sizes, run, available), "available": available}
        options.json.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return FITS if available is None or fits(sizes, run, available) else TOO_LARGE


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("batch", "accumulation", "length", "max_new_tokens", "lora_r", "gpus", "gpu_memory"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; choose a positive number")
    if options.fp8 and (not options.infer or options.bits != 16):
        parser.error(
            "--fp8 goes with --infer and without --bits; in training --base_dtype fp8 takes the memory of 16 bit"
        )
    if options.questions_per_image is not None and not 1 <= options.questions_per_image < float("inf"):
        parser.error(f"--questions-per-image is {options.questions_per_image}; choose 1 or more")
    if not 0 <= options.lora_dropout < 1:
        parser.error(f"--lora-dropout is {options.lora_dropout:g}; choose a share from 0 to below 1")
    if options.checkpoint_layers not in ("auto", "all") and not options.checkpoint_layers.isdecimal():
        parser.error(f"--checkpoint-layers is {options.checkpoint_layers}; choose auto, all or a number")
    inputs = {"--model-path": options.model_path, "--data": options.data}
    if options.json and (message := find_overwrite({"--json": output_file(options.json)}, inputs)):
        parser.error(message)


def sizes_of(model_path: str | None) -> ModelSizes:
    """Return the sizes of a model, or of LLaVA-1.5-7B.

    Raises:
        FileNotFoundError, ValueError: as `config_of`.
    """
    from llava.model.configuration import LlavaConfig
    from llava.model.memory import ModelSizes
    from llava.model.vision_tower import VIT_L_14_336

    return ModelSizes.of(config_of(model_path) if model_path else LlavaConfig(mm_vision_config=dict(VIT_L_14_336)))


def config_of(model_path: str) -> LlavaConfig:
    """Return a model's config with the sizes of its vision tower; its weights are not needed.

    Raises:
        FileNotFoundError: if the model is not found.
        ValueError: if its config is of another architecture.
    """
    from llava.model.checkpoint.checkpoint import open_checkpoint, read_config
    from llava.model.checkpoint.hub import resolve_config
    from llava.model.vision_tower import VIT_L_14_336

    config = read_config(resolve_config(model_path))
    if config.mm_vision_config is None and "clip-vit-large-patch14-336" in str(config.mm_vision_tower):
        config.mm_vision_config = dict(VIT_L_14_336)  # released configs have its name alone
    return config if config.mm_vision_config else open_checkpoint(model_path).config


def _free_memory() -> int | None:
    """Return the free bytes of this machine's GPU; None without one."""
    import torch

    from llava.model.devices import free_memory

    return free_memory("cuda") if torch.cuda.is_available() else None


def _training(options: argparse.Namespace, sizes: ModelSizes) -> Training:
    from llava.model.planner.setups import Training

    return Training(
        _workload(options, sizes),
        kind=options.kind,
        batch=options.batch or 16,
        accumulation=options.accumulation,
        rank=options.lora_r,
        dropout=options.lora_dropout,
        bits=options.bits,
        checkpointing=not options.no_checkpointing,
        checkpoint_layers=options.checkpoint_layers,
        zero=options.zero,
        offload=options.offload,
        gpus=options.gpus,
        trains_tower=options.train_tower,
        has_flex=not options.before_ampere,
    )


def _workload(options: argparse.Namespace, sizes: ModelSizes) -> Workload:
    from llava.model.planner.setups import PROMPT_LENGTH
    from llava.model.planner.workload import SUFFIX, SYSTEM_PREFIX, TABLE_QUESTIONS, Packs, PaddedRows

    if options.data:
        return _packs_of(options.data, options.model_path, sizes.patches)
    if options.no_sharing:
        return PaddedRows(options.length or PROMPT_LENGTH)
    suffix = max(options.length - SYSTEM_PREFIX - sizes.patches, 1) if options.length else SUFFIX
    return Packs.of_mean(options.questions_per_image or TABLE_QUESTIONS, patches=sizes.patches, suffix=suffix)


def _packs_of(data: str, model_path: str | None, patches: int) -> Workload:
    """Return the packs of data files; tokens are counted by the model's tokenizer, without one by the text's bytes.

    Raises:
        OSError, ValueError: if a file or the tokenizer can't be read, or no record can be trained on.
    """
    from llava.constants import DEFAULT_TEMPLATE
    from llava.model.planner.data_packs import ByteChunks, packs_of_data

    tokenizer = _tokenizer_of(model_path) if model_path else None
    template = (config_of(model_path).conversation_template if model_path else None) or DEFAULT_TEMPLATE
    packs, left_out = packs_of_data(data, template, tokenizer or ByteChunks(), patches=patches)
    rows, images = len(packs.sharing.suffixes), sum(packs.images)
    note = "" if tokenizer else "; tokens estimated from the text's length: no --model-path with a tokenizer was given"
    print(f"{data}: {rows:,} rows, {rows / max(images, 1):.2f} questions per image{note}")
    if left_out:
        print(f"{left_out:,} rows can't be trained on and are not counted; python -m llava.data.doctor lists them")
    return packs


def _tokenizer_of(model_path: str) -> LlavaTokenizer | None:
    """Return a model's tokenizer; None if only its config is on this machine."""
    from llava.model.checkpoint.checkpoint import open_tokenizer
    from llava.model.checkpoint.hub import resolve_config

    try:
        return open_tokenizer(resolve_config(model_path), config_of(model_path))
    except FileNotFoundError:
        return None


def _inference(options: argparse.Namespace) -> Inference:
    from llava.model.planner.setups import PROMPT_LENGTH, Inference

    bits = FP8 if options.fp8 else options.bits
    return Inference(options.batch or 1, options.length or PROMPT_LENGTH, options.max_new_tokens, bits)


if __name__ == "__main__":
    sys.exit(main())
