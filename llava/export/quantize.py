"""Quantise a model once and write it: a complete checkpoint in 4 or 8 bit that loads without a flag.

A LoRA adapter or projector is merged into its base on the way. One weight is in memory at a time.

Example:
    python scripts/quantize_checkpoint.py --model-path llava_merged_model --save-path llava_4bit_model --bits 4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.files.program_parser import program_parser
from llava.files.terminal_text import format_size, print_text
from llava.inference.command_line import device_name, run_program
from llava.model.checkpoint.command_line import open_source, open_target, parse_options

if TYPE_CHECKING:  # for annotations: they import torch
    import torch

    from llava.model.checkpoint.lazy_tensors import LazyTensors


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the command line says; return the exit code."""
    parser = program_parser("python scripts/quantize_checkpoint.py", __doc__)
    add = parser.add_argument
    add("--bits", required=True, type=int, choices=(4, 8), help="4: NF4 with double quantisation; 8: LLM.int8")
    add("--device", type=device_name, help="where to quantise: cuda or cpu (default: the best available)")
    dtype = "dtype of the weights that are not quantised (default: as they are, bfloat16 for float32)"
    options = parse_options(parser, argv, source="--model-path", target="--save-path", dtype=dtype)
    return run_program(lambda: quantize(options), refused=1)


def quantize(options: argparse.Namespace) -> None:
    """Write the quantised directory.

    Raises:
        FileExistsError: if the directory is there already.
        ImportError: if bitsandbytes is not installed.
        OSError: if it can't be written or there is no room for it.
        ValueError: if the weights are quantised already or don't fit their config, or bitsandbytes does not run on the
            device.
    """
    from llava.model.checkpoint.checkpoint import save_checkpoint  # takes seconds: flags are parsed first
    from llava.model.checkpoint.quantized import quantize_tensors
    from llava.model.checkpoint.write_tensors import stored_size
    from llava.model.configuration import LlavaConfig, dtype_name
    from llava.model.devices import DTYPES
    from llava.model.quantization import import_bitsandbytes, quantization_note, quantization_settings

    import_bitsandbytes()
    device = choose_device(options.device)
    checkpoint = open_source(options, "quantised again")
    dtype = DTYPES[options.dtype] if options.dtype else narrow_dtype(checkpoint.tensors)
    tensors = quantize_tensors(checkpoint.tensors, options.bits, dtype, device)
    settings = {
        "dtype": dtype_name(dtype),
        "quantization_config": quantization_settings(options.bits, dtype),
    }
    config = LlavaConfig.from_dict({**checkpoint.config.to_dict(), **settings})
    with open_target(options, tensors, None, "quantising") as (directory, progress):
        save_checkpoint(tensors, config, checkpoint.tokenizer, checkpoint.image_processor, directory, progress=progress)
    after, before = (format_size(stored_size(each)) for each in (tensors, checkpoint.tensors))
    print_text(f"wrote {options.target} in {options.bits} bit: {after}, before {before}")
    if note := quantization_note(checkpoint.config.base_model_bits):
        print(note)


def choose_device(name: str | None) -> torch.device:
    """Return the device asked for, else the best one that bitsandbytes runs on.

    Raises:
        ValueError: if bitsandbytes does not run on the device asked for.
    """
    from torch import device as torch_device

    from llava.model.devices import best_device
    from llava.model.quantization import DEVICES

    if name is None:
        best = best_device()
        return best if best.type in DEVICES else torch_device("cpu")
    device = torch_device(name)
    if device.type not in DEVICES:
        raise ValueError(f"--device {name}: quantising is supported on {' and '.join(DEVICES)}")
    return device


def narrow_dtype(tensors: LazyTensors) -> torch.dtype:
    """Return the dtype of the weights if it has 16 bit; else bf16."""
    from torch import bfloat16

    dtype = tensors.entries["model.embed_tokens.weight"].dtype
    return dtype if dtype.itemsize == 2 else bfloat16
