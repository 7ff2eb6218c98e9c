#!/usr/bin/env python3
"""Quantise a model once and write it: a complete directory in 4 or 8 bit that loads without a flag.

A LoRA adapter or projector is put on its base on the way. One weight is in memory at a time.

Example:
    python scripts/quantize_checkpoint.py --model-path llava_merged_model --save-path llava_4bit_model --bits 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from llava.constants import DEFAULT_TEMPLATE
from llava.files import atomic_directory
from llava.inference.command_line import run_program
from llava.model.builder import check_complete
from llava.model.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from llava.model.configuration import LlavaConfig
from llava.model.devices import DTYPES, best_device
from llava.model.lazy_tensors import LazyTensors
from llava.model.quantization import (
    DEVICES,
    import_bitsandbytes,
    quantization_note,
    quantization_settings,
    refuse_quantized,
)
from llava.model.quantized_files import quantize_tensors
from llava.model.weight_writer import refuse_full_disk


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the command line says; return the exit code."""
    options = parse_options(argv)
    return run_program(lambda: quantize(options), refused=1)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", required=True, help="directory or hub id of the model, LoRA adapter or projector")
    add("--model-base", help="directory or hub id of an adapter's or projector's base (default: as recorded there)")
    add("--save-path", required=True, type=Path, help="directory to write")
    add("--bits", required=True, type=int, choices=(4, 8), help="4: NF4 with double quantisation; 8: LLM.int8")
    add("--dtype", choices=sorted(DTYPES), help="of what stays as it is (default: the weights', bfloat16 for float32)")
    add("--vision-tower", help="image encoder, for weights that come without one")
    add("--allow-other-base", action="store_true", help="accept a base the adapter was not trained on")
    add("--overwrite", action="store_true", help="replace a directory that is already there")
    add("--device", type=torch.device, help="where to quantise: cuda or cpu (default: the best there is)")
    return parser.parse_args(argv)


def quantize(options: argparse.Namespace) -> None:
    """Write the quantised directory.

    Raises:
        FileExistsError: if the directory is there already.
        ImportError: if bitsandbytes is not installed.
        OSError: if it can't be written or there is no room for it.
        ValueError: if the weights are quantised already or don't fit their config, or bitsandbytes does not run on the
            device.
    """
    import_bitsandbytes()
    device = choose_device(options.device)
    places = {"vision_tower": options.vision_tower, "allow_other_base": options.allow_other_base}
    checkpoint = open_checkpoint(options.model_path, options.model_base, **places)
    refuse_quantized(checkpoint.config, options.model_path, "quantised again")
    check_complete(checkpoint)
    dtype = DTYPES[options.dtype] if options.dtype else narrow_dtype(checkpoint.tensors)
    tensors = quantize_tensors(checkpoint.tensors, options.bits, dtype, device)
    config = describe(checkpoint.config, options.bits, dtype)
    refuse_full_disk(tensors, None, options.save_path)
    with atomic_directory(options.save_path, replace=options.overwrite) as directory:
        write(checkpoint, tensors, config, directory)
    before, after = (sum(entry.nbytes for entry in each.entries.values()) for each in (checkpoint.tensors, tensors))
    print(f"wrote {options.save_path} in {options.bits} bit: {after / 1e9:.3g} GB, before {before / 1e9:.3g} GB")
    note = quantization_note(checkpoint.config.base_model_bits)
    if note:
        print(note)


def choose_device(device: torch.device | None) -> torch.device:
    """Return the device asked for, else the best one that bitsandbytes runs on.

    Raises:
        ValueError: if bitsandbytes does not run on the device asked for.
    """
    if device is None:
        best = best_device()
        return best if best.type in DEVICES else torch.device("cpu")
    if device.type not in DEVICES:
        raise ValueError(f"--device {device}: quantising is supported on {' and '.join(DEVICES)}")
    return device


def narrow_dtype(tensors: LazyTensors) -> torch.dtype:
    """Return the dtype that weights are in, if it has 16 bit; else bf16."""
    dtype = tensors.entries["model.embed_tokens.weight"].dtype
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def describe(config: LlavaConfig, bits: int, dtype: torch.dtype) -> LlavaConfig:
    """Return the config of the quantised weights."""
    return LlavaConfig.from_dict(
        {
            **config.to_dict(),
            "dtype": str(dtype).removeprefix("torch."),
            "conversation_template": config.conversation_template or DEFAULT_TEMPLATE,
            "quantization_config": quantization_settings(bits, dtype),
        }
    )


def write(checkpoint: Checkpoint, tensors: LazyTensors, config: LlavaConfig, directory: Path) -> None:
    """Write a complete directory, tensor by tensor, with a progress bar."""
    total = sum(entry.nbytes for entry in tensors.entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="quantising") as bar:
        save_checkpoint(
            tensors, config, checkpoint.tokenizer, checkpoint.image_processor, directory, progress=bar.update
        )


if __name__ == "__main__":
    sys.exit(main())
