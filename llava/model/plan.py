"""Memory plan of a run: bytes needed on each GPU, bytes available, and the nearest setup that fits.

`python -m llava.model.plan --model-path checkpoints/... --train --batch 16` prints it; training prints the same at its
start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.terminal_text import format_size, report_error
from llava.model import memory
from llava.model.memory import ModelSizes

if TYPE_CHECKING:  # for annotations: it imports transformers
    from llava.model.configuration import LlavaConfig

CONTEXT_BYTES = 800_000_000
"""Memory of a CUDA context and its libraries (measured: 0.78 GB on an H200 with torch 2.11)."""
TABLE_LENGTH = 640
"""Positions of a row of the VQA table: 35 of text, 576 of the image, a short question and its answer."""
FITS, TOO_LARGE, WRONG_USAGE = 0, 1, 2
_KINDS = ("lora", "full", "projector")


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        kind: "lora", "full" (all of the LLM and the projector) or "projector".
        batch: rows of a batch on each GPU.
        accumulation: batches of a step.
        length: of the longest row, in positions.
        is_padded: whether rows differ in length.
        rank: of the adapters.
        dropout: 0..1.
        bits: of the LLM's weights.
        checkpointing: activation checkpointing of all layers.
        zero: DeepSpeed's stage; 0 = no DeepSpeed.
        offload: fp32 weights and moments in CPU memory, in stage 3 the weights too.
        gpus: processes.
    """

    kind: str = "lora"
    batch: int = 16
    accumulation: int = 1
    length: int = TABLE_LENGTH
    is_padded: bool = True
    rank: int = 128
    dropout: float = 0.05
    bits: int = 16
    checkpointing: bool = True
    zero: int = 2
    offload: bool = False
    gpus: int = 1

    def flags(self) -> str:
        """Return the flags of the training program for this run."""
        words = [
            f"--per_device_train_batch_size {self.batch}",
            f"--gradient_accumulation_steps {self.accumulation}",
            f"--gradient_checkpointing {self.checkpointing}",
        ]
        words += [f"--bits {self.bits}"] if self.bits != 16 else []
        if self.zero:
            words.append(f"--deepspeed scripts/zero{self.zero}{'_offload' if self.offload else ''}.json")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Inference:
    """An inference run.

    Attributes:
        batch: requests of a batch.
        length: of a prompt, in positions.
        new_tokens: length of the longest answer, in tokens.
        bits: of the LLM's weights.
    """

    batch: int = 1
    length: int = TABLE_LENGTH
    new_tokens: int = 128
    bits: int = 16

    def flags(self) -> str:
        """Return the flags of the batch program for this run."""
        return f"--batch-size {self.batch}" + (f" --load-{self.bits}bit" if self.bits != 16 else "")


def plan_training(sizes: ModelSizes, run: Training) -> dict[str, int]:
    """Return the peak bytes of a training run on each GPU, by use."""
    rank = run.rank if run.kind == "lora" else 0
    trained = {
        "lora": sizes.lora_parameters(run.rank) + sizes.projector_parameters,
        "full": sizes.llm_parameters + sizes.projector_parameters,
        "projector": sizes.projector_parameters,
    }[run.kind]
    own = 0 if run.kind == "lora" else memory.HALF * sizes.projector_parameters
    own += memory.HALF * sizes.llm_parameters if run.kind == "full" else 0
    frozen = memory.weight_bytes(sizes, run.bits) - (own or memory.HALF * sizes.projector_parameters)
    if run.zero == 3:
        frozen = 0 if run.offload else frozen // run.gpus
    parts = {
        "frozen weights": frozen,
        "trained weights, gradients, optimizer": memory.optimizer_bytes(
            trained, zero=run.zero, gpus=run.gpus, offload=run.offload
        ),
        "activations": memory.training_peak(
            sizes,
            batch=run.batch,
            length=run.length,
            rank=rank,
            dropout=run.dropout if rank else 0.0,
            is_padded=run.is_padded,
            checkpointing=run.checkpointing,
        ),
    }
    if run.zero == 3:
        parts["gathered weights"] = min(memory.HALF * memory.GATHERED_PARAMETERS, memory.weight_bytes(sizes, 16))
    if run.bits != 16:
        parts["unpacked weights"] = 2 * memory.largest_matrix(sizes)
    return parts


def plan_inference(sizes: ModelSizes, run: Inference) -> dict[str, int]:
    """Return the peak bytes of inference on a GPU, by use."""
    cache = memory.cache_bytes(sizes, run.batch * (run.length + run.new_tokens))
    prompt = memory.cache_bytes(sizes, run.batch * run.length)
    workspace = run.batch * run.length * memory.prefill_workspace(sizes, run.length)
    growth = cache // sizes.layers // 2  # the longer copy of one layer's keys, while the shorter one is live
    parts = {
        "weights": memory.weight_bytes(sizes, run.bits),
        "cache of keys and values": cache,
        # Decoding begins after the prefill: the peak is in one or the other.
        "computation": max(workspace - (cache - prompt), growth, 0),
    }
    if run.bits != 16:
        parts["unpacked weights"] = memory.largest_matrix(sizes)
    return parts


def fitting_training(sizes: ModelSizes, run: Training, available: int) -> Training | None:
    """Return the nearest setup that fits, None if there is none.

    In this order: activation checkpointing; smaller batches, more of them a step; 4-bit weights under LoRA;
    partitioning over several GPUs, then fp32 weights in CPU memory.
    """
    return next((other for other in _smaller_training(run) if _fits(plan_training(sizes, other), available)), None)


def _smaller_training(run: Training) -> Iterator[Training]:
    yield run
    run = dataclasses.replace(run, checkpointing=True)
    requested = run
    yield run
    while run.batch > 1:
        rows = run.batch * run.accumulation
        batch = run.batch // 2
        run = dataclasses.replace(run, batch=batch, accumulation=-(-rows // batch))
        yield run
    if run.kind == "lora" and run.bits == 16 and run.zero != 3:
        for other in (requested, run):
            yield dataclasses.replace(other, bits=4)
    if run.bits == 16:
        if run.gpus > 1:
            yield dataclasses.replace(run, zero=3)
        yield dataclasses.replace(run, zero=3, offload=True)


def fitting_inference(sizes: ModelSizes, run: Inference, available: int) -> Inference | None:
    """Return the nearest setup that fits, None if there is none: smaller batches first, then 8 and 4 bit."""
    return next((other for other in _smaller_inference(run) if _fits(plan_inference(sizes, other), available)), None)


def _smaller_inference(run: Inference) -> Iterator[Inference]:
    for bits in (bits for bits in (16, 8, 4) if bits <= run.bits):
        batch = run.batch
        while batch:
            yield dataclasses.replace(run, bits=bits, batch=batch)
            batch //= 2


def _fits(parts: dict[str, int], available: int) -> bool:
    return sum(parts.values()) + CONTEXT_BYTES <= available


def describe_plan(sizes: ModelSizes, run: Training | Inference, available: int | None) -> str:
    """Return a table of needed and available memory, and the nearest setup that fits.

    Args:
        sizes: of the model.
        run: the planned run.
        available: bytes free on each GPU; None = unknown.
    """
    is_training = isinstance(run, Training)
    parts = plan_training(sizes, run) if is_training else plan_inference(sizes, run)
    rows = [*parts.items(), ("CUDA itself", CONTEXT_BYTES)]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {_gigabytes(size):>9}" for name, size in rows]
    needed = sum(size for _, size in rows)
    lines.append(f"  {'needed on each GPU':<{width}}  {_gigabytes(needed):>9}")
    if available is None:
        return "\n".join(lines)
    lines.append(f"  {'available':<{width}}  {_gigabytes(available):>9}")
    if needed <= available:
        return "\n".join([*lines, "it fits"])
    other = fitting_training(sizes, run, available) if is_training else fitting_inference(sizes, run, available)
    if other is None:
        return "\n".join([*lines, "it does not fit, nor does anything smaller on such a GPU; use a larger one"])
    less = sum((plan_training(sizes, other) if is_training else plan_inference(sizes, other)).values()) + CONTEXT_BYTES
    return "\n".join([*lines, f"it does not fit; this does, with {_gigabytes(less)}: {other.flags()}"])


def _gigabytes(size: int) -> str:
    """Return a size for a column of gigabytes; one that would be 0.0 there has its own unit."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else format_size(size)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.model.plan",
        description="Print the GPU memory that training or inference needs, and a setup that fits.",
        epilog="""examples:
  python -m llava.model.plan --model-path liuhaotian/llava-v1.5-7b --train --batch 16
  python -m llava.model.plan --model-path llava_merged_model --infer --bits 4 --gpu-memory 8
exit code: 0 it fits (or no GPU was named), 1 it does not fit, 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="directory or hub id; its config is read, not its weights")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--train", action="store_true", help="plan training (the default)")
    task.add_argument("--infer", action="store_true", help="plan inference")
    add("--bits", type=int, choices=(16, 8, 4), default=16, help="bits of the LLM's weights (default: %(default)s)")
    add("--batch", type=int, help="batch size on each GPU (default: 16 in training, 1 in inference)")
    add("--length", type=int, default=TABLE_LENGTH, help="longest row in positions, patches too (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="tokens of the longest answer (default: %(default)s)")
    add("--kind", choices=_KINDS, default="lora", help="trainable parameters (default: %(default)s)")
    add("--lora-r", type=int, default=128, help="rank of the adapters (default: %(default)s)")
    add("--lora-dropout", type=float, default=0.05, help="LoRA dropout, 0 to 1 (default: %(default)s)")
    add("--no-checkpointing", action="store_true", help="without activation checkpointing")
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
    for name in ("batch", "length", "max_new_tokens", "lora_r", "gpus", "gpu_memory"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; choose a positive number")
    inputs = {"--model-path": options.model_path}
    if options.json and (message := find_overwrite({"--json": output_file(options.json)}, inputs)):
        parser.error(message)
    try:
        sizes = ModelSizes.of(config_of(options.model_path))
    except (OSError, ValueError) as error:
        report_error(error)
        return WRONG_USAGE
    available = round(options.gpu_memory * 1e9) if options.gpu_memory else None
    if available is None:
        available = _free_here()
    run = _inference(options) if options.infer else _training(options)
    print(
        f"{'inference' if options.infer else 'training'} {options.model_path}\n{describe_plan(sizes, run, available)}"
    )
    parts = plan_inference(sizes, run) if options.infer else plan_training(sizes, run)
    if options.json:
        plan = {"setup": dataclasses.asdict(run), "bytes": {**parts, "CUDA itself": CONTEXT_BYTES}}
        options.json.write_text(json.dumps({**plan, "available": available}, indent=2) + "\n", encoding="utf-8")
    return FITS if available is None or _fits(parts, available) else TOO_LARGE


def config_of(model_path: str) -> LlavaConfig:
    """Return a model's config with the sizes of its vision tower; its weights are not needed.

    Raises:
        FileNotFoundError: if the model is not found.
        ValueError: if its config is of another architecture.
    """
    from llava.model.checkpoint.checkpoint import open_checkpoint, read_config  # takes seconds: flags are parsed first
    from llava.model.checkpoint.hub import resolve_config
    from llava.model.vision_tower import VIT_L_14_336

    config = read_config(resolve_config(model_path))
    if config.mm_vision_config is None and "clip-vit-large-patch14-336" in str(config.mm_vision_tower):
        config.mm_vision_config = dict(VIT_L_14_336)  # released configs have its name alone
    return config if config.mm_vision_config else open_checkpoint(model_path).config


def _free_here() -> int | None:
    from torch import cuda

    from llava.model.devices import free_memory

    return free_memory("cuda") if cuda.is_available() else None


def _training(options: argparse.Namespace) -> Training:
    return Training(
        kind=options.kind,
        batch=options.batch or 16,
        length=options.length,
        rank=options.lora_r,
        dropout=options.lora_dropout,
        bits=options.bits,
        checkpointing=not options.no_checkpointing,
        zero=options.zero,
        offload=options.offload,
        gpus=options.gpus,
    )


def _inference(options: argparse.Namespace) -> Inference:
    return Inference(options.batch or 1, options.length, options.max_new_tokens, options.bits)


if __name__ == "__main__":
    sys.exit(main())
