"""Merge a LoRA adapter (or a projector) into its base and write one complete checkpoint.

Example:
    python scripts/merge_lora_weights.py --model-path checkpoints/llava-v1.5-7b-task-lora \\
        --model-base liuhaotian/llava-v1.5-7b --save-model-path llava_merged_model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import device_name, run_program
from llava.model.checkpoint.command_line import open_source, open_target, parse_options

if TYPE_CHECKING:  # for annotations: they import torch
    import torch

    from llava.inference.parity import Parity
    from llava.model.checkpoint.checkpoint import Checkpoint

LLM_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
"""Its dtype is written: weights trained without an adapter, embedding and projector too, may have another."""


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; return the exit code."""
    parser = program_parser("python scripts/merge_lora_weights.py", __doc__)
    parser.add_argument("--no-parity", action="store_true", help="don't compare adapter and merged model afterwards")
    parser.add_argument("--device", type=device_name, help="where the comparison runs (default: the best available)")
    dtype = "dtype of the written weights (default: the base's)"
    options = parse_options(parser, argv, source="--model-path", target="--save-model-path", dtype=dtype)
    return run_program(lambda: merge(options), refused=1)


def merge(options: argparse.Namespace) -> None:
    """Write the merged checkpoint, then measure how far it differs from base and adapter.

    Raises:
        FileExistsError: if the directory is there already.
        OSError: if it can't be written or there is no room for it.
        ValueError: if the model path holds full weights, the base is another one, the two don't make a model, or the
            result differs from adapter and base by more than rounding explains.
    """
    from llava.model.checkpoint.checkpoint import Layout  # takes seconds: flags are parsed first
    from llava.model.checkpoint.convert import write_original
    from llava.model.devices import DTYPES
    from llava.model.quantization import quantization_note

    checkpoint = open_source(options, "merged")
    if checkpoint.layout not in (Layout.LORA, Layout.PROJECTOR):
        raise ValueError(f"--model-path {options.source} holds {checkpoint.layout.value}: there is nothing to merge")
    dtype = DTYPES[options.dtype] if options.dtype else checkpoint.tensors.entries[LLM_WEIGHT].dtype
    with open_target(options, checkpoint.tensors, dtype, "merging") as (directory, progress):
        write_original(checkpoint, directory, dtype, progress)
    print_text(f"wrote {options.target} in {str(dtype).removeprefix('torch.')}")
    if note := quantization_note(checkpoint.config.base_model_bits):
        print(note)
    if not options.no_parity:
        measure_parity(options, checkpoint, dtype)


def measure_parity(options: argparse.Namespace, merged: Checkpoint, dtype: torch.dtype) -> None:
    """Print how far three models differ: adapter beside base, merged in memory, and the checkpoint just written.

    Where a model does not fit into memory, the written tensors are compared with base and adapter one by one.

    Args:
        options: of the command line.
        merged: what was written.
        dtype: in which it was written.

    Raises:
        ValueError: if they differ by more than rounding explains.
    """
    from torch import device as torch_device

    from llava.inference.parity import compare_probes, fits_in_memory, probe_checkpoint
    from llava.model.adapter.lora import read_adapter
    from llava.model.adapter.merge import check_merged
    from llava.model.checkpoint.checkpoint import Layout, open_checkpoint
    from llava.model.checkpoint.write_tensors import stored_size
    from llava.model.devices import best_device, default_dtype

    is_lora = merged.layout is Layout.LORA
    separate = open_source(options, "merged", with_adapter=not is_lora)
    reloaded = open_checkpoint(options.target)
    device = torch_device(options.device) if options.device else best_device()
    if not fits_in_memory(stored_size(merged.tensors, default_dtype(device)), device):
        adapter = read_adapter(merged.directory, options.mm_projector) if is_lora else None
        check_merged(separate.tensors, adapter, reloaded.tensors)
        print("parity: too little memory for the model; each tensor compared with base + adapter: equal to rounding")
        return
    adapter_directory = merged.directory if is_lora else None
    before = probe_checkpoint(separate, device, adapter_directory=adapter_directory, mm_projector=options.mm_projector)
    summed, after = probe_checkpoint(merged, device), probe_checkpoint(reloaded, device)
    print(f"parity on {len(before)} question(s), computed in {default_dtype(device)}:")
    kinds = f"{merged.layout.value} beside its base - merged", f"merged - reloaded from {options.target}"
    parities = compare_probes(before, summed), compare_probes(summed, after)
    for kind, parity in zip(kinds, parities, strict=True):
        print_text(f"  {kind}   {describe(parity)}")
    dtypes = {dtype, default_dtype(device), *(entry.dtype for entry in merged.tensors.entries.values())}
    for kind, parity in zip(kinds, parities, strict=True):
        refuse_difference(kind, parity, dtypes, options.target)


def refuse_difference(kind: str, parity: Parity, dtypes: set[torch.dtype], path: Path) -> None:
    """Raise if logits differ by more than rounding explains.

    Raises:
        ValueError: if it is larger; the merged weights are not what they should be.
    """
    from llava.inference.parity import rounding_bound

    bound = rounding_bound(parity.logit_scale, *dtypes)
    if not parity.logit_difference <= bound:  # NaN too
        raise ValueError(
            f"{kind}: the logits differ by {parity.logit_difference:.2g}, and rounding explains {bound:.2g} at most; "
            f"don't use {path}: the merge went wrong (--no-parity leaves this comparison out)"
        )


def describe(parity: Parity) -> str:
    """Return a comparison as text."""
    return (
        f"largest logit difference {parity.logit_difference:.2g} (largest logit {parity.logit_scale:.3g}), "
        f"equal greedy answers {100 * parity.greedy_agreement:.0f} %"
    )
