#!/usr/bin/env python3
"""Add a LoRA adapter (or a projector) to its base and write one complete checkpoint.

Example:
    python scripts/merge_lora_weights.py --model-path checkpoints/llava-v1.5-7b-task-lora \\
        --model-base liuhaotian/llava-v1.5-7b --save-model-path llava_merged_model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.constants import DEFAULT_TEMPLATE
from llava.files import atomic_directory
from llava.inference.command_line import run_program
from llava.inference.parity import Parity, Prober, compare_probes
from llava.model.adapter import read_adapter
from llava.model.checkpoint import Checkpoint, Layout, open_checkpoint
from llava.model.conversion import write_original
from llava.model.devices import DTYPES, best_device, default_dtype
from llava.model.quantization import quantization_note
from llava.model.weight_writer import refuse_full_disk


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; return the exit code."""
    options = parse_options(argv)
    return run_program(lambda: merge(options), refused=1)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="directory of the LoRA adapter or projector")
    parser.add_argument("--model-base", help="directory or hub id of its base (default: the one recorded there)")
    parser.add_argument("--save-model-path", required=True, type=Path, help="directory to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights (default: the base's)")
    parser.add_argument("--vision-tower", help="image encoder, for a base that comes without one")
    parser.add_argument(
        "--mm-projector", help="projector, for an adapter directory that comes without the one trained with it"
    )
    parser.add_argument("--allow-other-base", action="store_true", help="accept a base the adapter was not trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that is already there")
    parser.add_argument("--no-parity", action="store_true", help="don't compare adapter and merged model afterwards")
    parser.add_argument("--device", help="where the comparison runs (default: the best there is)")
    return parser.parse_args(argv)


def merge(options: argparse.Namespace) -> None:
    """Write the merged directory, then measure how far it differs from base and adapter.

    Raises:
        FileExistsError: if the directory is there already.
        OSError: if it can't be written or there is no room for it.
        ValueError: if the model path holds full weights, the base is another one, or the two don't make a model.
    """
    checkpoint = open_checkpoint(options.model_path, options.model_base, **places(options))
    if checkpoint.layout not in (Layout.LORA, Layout.PROJECTOR):
        raise ValueError(
            f"--model-path {options.model_path} holds {checkpoint.layout.value}: there is nothing to merge"
        )
    checkpoint.config.conversation_template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
    dtype = DTYPES[options.dtype] if options.dtype else checkpoint.tensors.entries["model.embed_tokens.weight"].dtype
    refuse_full_disk(checkpoint.tensors, dtype, options.save_model_path)
    with atomic_directory(options.save_model_path, replace=options.overwrite) as directory:
        write_merged(checkpoint, directory, dtype)
    print(f"wrote {options.save_model_path} in {str(dtype).removeprefix('torch.')}")
    note = quantization_note(checkpoint.config.base_model_bits)
    if note:
        print(note)
    if not options.no_parity:
        measure_parity(options, checkpoint)


def places(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `open_checkpoint` that the command line gives."""
    return {key: getattr(options, key) for key in ("vision_tower", "mm_projector", "allow_other_base")}


def write_merged(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype) -> None:
    """Write a complete checkpoint, tensor by tensor, with a progress bar."""
    total = sum(entry.shape.numel() * dtype.itemsize for entry in checkpoint.tensors.entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="merging") as bar:
        write_original(checkpoint, directory, dtype, bar.update)


def measure_parity(options: argparse.Namespace, merged: Checkpoint) -> None:
    """Print how far adapter beside base, sums in memory, and the directory just written differ."""
    is_lora = merged.layout is Layout.LORA
    separate = open_checkpoint(options.model_path, options.model_base, with_adapter=not is_lora, **places(options))
    device = torch.device(options.device) if options.device else best_device()
    size = sum(entry.shape.numel() for entry in merged.tensors.entries.values()) * default_dtype(device).itemsize
    prober = Prober(size, device)
    if prober.is_streamed and is_lora and read_adapter(merged.directory).magnitudes:
        print("not compared: memory is short, and a DoRA adapter can't run with the weights left in their files")
        return
    if prober.is_streamed:
        print("comparing with the weights left in their files, since memory is short; --no-parity leaves it out")
    adapter = str(merged.directory) if is_lora else None
    before = prober.ask(separate, adapter_directory=adapter)
    summed = prober.ask(merged)
    reloaded = prober.ask(open_checkpoint(options.save_model_path))
    print(f"parity on {len(before)} question(s), computed in {default_dtype(device)}:")
    print(f"  {merged.layout.value} beside its base - merged   {describe(compare_probes(before, summed))}")
    print(f"  merged - reloaded from {options.save_model_path}   {describe(compare_probes(summed, reloaded))}")


def describe(parity: Parity) -> str:
    """Return a comparison in words."""
    return (
        f"largest logit difference {parity.logit_difference:.2g} (largest logit {parity.logit_scale:.3g}), "
        f"equal greedy answers {100 * parity.greedy_agreement:.0f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
