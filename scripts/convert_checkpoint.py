#!/usr/bin/env python3
"""Write a checkpoint in the other layout: `hf` for transformers, vLLM and SGLang, `original` for this code and LLaVA's.

Reads whatever loads here: full weights in either layout, a LoRA adapter or projector with its base (merged on the way),
a hub id. What is in the layout already is written anew, as safetensors.

Example:
    python scripts/convert_checkpoint.py --from llava_merged_model --to llava_merged_model_hf --layout hf
    python scripts/convert_checkpoint.py --from llava-hf/llava-1.5-7b-hf --to llava-v1.5-7b --layout original
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from llava.chat_template import chat_template
from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.files import atomic_directory
from llava.inference.command_line import run_program
from llava.model.checkpoint import open_checkpoint
from llava.model.conversion import write_hf, write_original
from llava.model.devices import DTYPES
from llava.model.quantization import refuse_quantized
from llava.model.weight_writer import refuse_full_disk


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    options = parse_options(argv)
    return run_program(lambda: convert(options), refused=1)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="directory or hub id to read")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="directory to write")
    parser.add_argument("--layout", required=True, choices=("hf", "original"), help="of the directory to write")
    parser.add_argument("--model-base", help="weights under an adapter or projector (default: as recorded there)")
    parser.add_argument("--vision-tower", help="image encoder, for weights that come without one")
    parser.add_argument(
        "--mm-projector", help="projector, for an adapter directory that comes without the one trained with it"
    )
    parser.add_argument("--allow-other-base", action="store_true", help="accept a base the adapter was not trained on")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that is already there")
    return parser.parse_args(argv)


def convert(options: argparse.Namespace) -> None:
    """Write the directory.

    Raises:
        FileExistsError: if it is there already.
        OSError: if it can't be written.
        ValueError: if the layout can't hold the model.
    """
    keys = ("vision_tower", "mm_projector", "allow_other_base")
    checkpoint = open_checkpoint(options.source, options.model_base, **{key: getattr(options, key) for key in keys})
    refuse_quantized(checkpoint.config, options.source, "converted")
    dtype = DTYPES[options.dtype] if options.dtype else None
    refuse_full_disk(checkpoint.tensors, dtype, options.target)
    template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
    checkpoint.config.conversation_template = template
    total = sum(entry.shape.numel() * (dtype or entry.dtype).itemsize for entry in checkpoint.tensors.entries.values())
    with (
        atomic_directory(options.target, replace=options.overwrite) as directory,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="converting") as bar,
    ):
        if options.layout == "hf":
            write_hf(checkpoint, directory, dtype, chat_template(get_template(template)), bar.update)
        else:
            write_original(checkpoint, directory, dtype, bar.update)
    print(f"{options.source} ({checkpoint.layout.value}) -> {options.target} ({options.layout} layout)")
    print(f"{len(checkpoint.tensors)} tensors, {total / 1e9:.2f} GB, prompt template {template}")


if __name__ == "__main__":
    sys.exit(main())
