"""Options and steps shared by the programs that write a checkpoint: merge, convert, quantize."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import DEFAULT_TEMPLATE, DTYPE_NAMES
from llava.files.atomic_files import atomic_directory
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_directory

if TYPE_CHECKING:  # for annotations: they import torch
    import torch

    from llava.model.checkpoint.checkpoint import Checkpoint
    from llava.model.checkpoint.lazy_tensors import LazyTensors


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, source: str, target: str, dtype: str
) -> argparse.Namespace:
    """Add the shared options to a program's own and parse its command line.

    Args:
        parser: with the program's own options.
        argv: None = `sys.argv`.
        source: flag of the checkpoint to read, stored as `source`.
        target: flag of the directory to write, stored as `target`.
        dtype: help text of `--dtype`.
    """
    add = parser.add_argument
    add(source, dest="source", required=True, help="directory or hub id of the model, LoRA adapter or projector")
    add(target, dest="target", required=True, type=Path, help="directory to write")
    add("--model-base", help="directory or hub id of an adapter's or projector's base (default: as recorded there)")
    add("--vision-tower", help="directory or hub id of the vision tower, for weights that come without one")
    add("--mm-projector", help="projector, for an adapter directory that comes without the one trained with it")
    add("--allow-other-base", action="store_true", help="accept a base the adapter was not trained on")
    add("--dtype", choices=sorted(DTYPE_NAMES), help=dtype)
    add("--overwrite", action="store_true", help="replace a directory that is already there")
    options = expand_homes(parser.parse_args(argv), "source", "target", "model_base", "vision_tower", "mm_projector")
    inputs = {
        source: options.source,
        "--model-base": options.model_base,
        "--vision-tower": options.vision_tower,
        "--mm-projector": options.mm_projector,
    }
    if message := find_overwrite({target: output_directory(options.target)}, inputs):
        parser.error(message)
    return options


def open_source(options: argparse.Namespace, use: str, *, with_adapter: bool = True) -> Checkpoint:
    """Open the checkpoint that the options name, with a prompt template; its weights fit its config.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the weights are quantised ("can't be USE"), don't fit their config, or the base is another one.
    """
    from llava.model.builder import check_complete  # takes seconds, like all that reads weights
    from llava.model.checkpoint.checkpoint import open_checkpoint
    from llava.model.quantization import refuse_quantized

    checkpoint = open_checkpoint(
        options.source,
        options.model_base,
        vision_tower=options.vision_tower,
        mm_projector=options.mm_projector,
        allow_other_base=options.allow_other_base,
        with_adapter=with_adapter,
    )
    refuse_quantized(checkpoint.config, options.source, use)
    check_complete(checkpoint)
    checkpoint.config.conversation_template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
    return checkpoint


@contextlib.contextmanager
def open_target(
    options: argparse.Namespace, tensors: LazyTensors, dtype: torch.dtype | None, label: str
) -> Iterator[tuple[Path, Callable[[int], object]]]:
    """Yield the directory to fill, and the function that moves the progress bar on by a number of bytes.

    Args:
        options: from `parse_options`.
        tensors: that will be written.
        dtype: of floating-point tensors in the file; None = as they are.
        label: of the progress bar.

    Raises:
        FileExistsError: if the directory is there already.
        OSError: if it can't be written, or there is no room for it.
    """
    from tqdm import tqdm

    from llava.model.checkpoint.write_tensors import refuse_full_disk, stored_size

    refuse_full_disk(tensors, dtype, options.target)
    total = stored_size(tensors, dtype)
    with (
        atomic_directory(options.target, replace=options.overwrite) as directory,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=label) as bar,
    ):
        yield directory, bar.update
