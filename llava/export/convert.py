"""Write a checkpoint in the other layout: `hf` for transformers, vLLM and SGLang, `original` for this code and LLaVA's.

Reads whatever loads here: full weights in either layout, a LoRA adapter or projector with its base (merged on the way),
a hub id. A checkpoint that has the layout already is copied as safetensors.

Example:
    python scripts/convert_checkpoint.py --from llava_merged_model --to llava_merged_model_hf --layout hf
    python scripts/convert_checkpoint.py --from llava-hf/llava-1.5-7b-hf --to llava-v1.5-7b --layout original
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.files.program_parser import program_parser
from llava.files.terminal_text import format_size, print_text
from llava.inference.command_line import run_program
from llava.model.checkpoint.command_line import open_source, open_target, parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    parser = program_parser("python scripts/convert_checkpoint.py", __doc__)
    parser.add_argument("--layout", required=True, choices=("hf", "original"), help="layout to write")
    dtype = "dtype of the written weights (default: as they are)"
    options = parse_options(parser, argv, source="--from", target="--to", dtype=dtype)
    return run_program(lambda: convert(options), refused=1)


def convert(options: argparse.Namespace) -> None:
    """Write the directory.

    Raises:
        FileExistsError: if it is there already.
        OSError: if it can't be written or there is no room for it.
        ValueError: if the weights don't make a model, or the layout can't hold it.
    """
    from llava.chat_template import chat_template
    from llava.conversation import get_template
    from llava.model.checkpoint.convert import write_hf, write_original  # takes seconds: flags are parsed first
    from llava.model.checkpoint.write_tensors import stored_size
    from llava.model.devices import DTYPES

    checkpoint = open_source(options, "converted")
    dtype = DTYPES[options.dtype] if options.dtype else None
    template = checkpoint.config.conversation_template
    with open_target(options, checkpoint.tensors, dtype, "converting") as (directory, progress):
        if options.layout == "hf":
            write_hf(checkpoint, directory, dtype, chat_template(get_template(template)), progress)
        else:
            write_original(checkpoint, directory, dtype, progress)
    size = format_size(stored_size(checkpoint.tensors, dtype))
    print_text(f"{options.source} ({checkpoint.layout.value}) -> {options.target} ({options.layout} layout)")
    print_text(f"{len(checkpoint.tensors)} tensors, {size}, prompt template {template}")
