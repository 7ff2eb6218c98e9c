"""Parse and check the command line of training."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence

import transformers
from transformers import HfArgumentParser

from llava.train.flags.arguments import RENAMED_FLAGS, DataArguments, ModelArguments, TrainingArguments
from llava.train.flags.check_arguments import check_arguments
from llava.train.flags.dropped_flags import settle_dropped_flags
from llava.train.flags.overwrites import refuse_overwrites
from llava.train.flags.requirements import check_requirements

logger = logging.getLogger(__name__)

_USAGE = "%(prog)s --data_path FILE --output_dir DIR [further flags, which --help lists]"
NEWER_FLAGS = ("dataloader_multiprocessing_context", "dataloader_in_order")
"""Flags that only newer supported versions of transformers have."""


def parse_arguments(argv: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line.

    Raises:
        ValueError: if a flag is unknown, lacks its file or contradicts another, or the run would overwrite an input;
            the message names the flag and what to do.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), prog="train_mem.py", usage=_USAGE)
    words, notes = settle_dropped_flags(sys.argv[1:] if argv is None else argv)
    *arguments, unknown = parser.parse_args_into_dataclasses(
        [_current_name(word) for word in words], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_describe_unknown(unknown[0], parser))
    for note in notes:
        logger.info("%s", note)
    model, data, training = arguments
    check_arguments(model, data, training)
    refuse_overwrites(model, data, training)
    check_requirements(training)
    return model, data, training


def _describe_unknown(word: str, parser: HfArgumentParser) -> str:
    if _flag_name(word) in NEWER_FLAGS:
        return f"{word} is not known to transformers {transformers.__version__}; pip install --upgrade transformers"
    if not word.startswith("-"):
        return f"{word} follows no flag that takes it; see --help"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _flag_name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _current_name(word: str) -> str:
    name = _flag_name(word)
    if not word.startswith("--") or name not in RENAMED_FLAGS:
        return word
    _, equals, value = word.partition("=")
    return f"--{RENAMED_FLAGS[name]}{equals}{value}"
