"""The command line of training."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from llava.train.arguments import RENAMED_FLAGS, DataArguments, ModelArguments, TrainingArguments
from llava.train.refusals import check_arguments


def parse_arguments(argv: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line.

    Raises:
        ValueError: if a flag is unknown, lacks its file or contradicts another; the flag and the way out are named.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), prog="train_mem.py")
    words = [_current_name(word) for word in (sys.argv[1:] if argv is None else argv)]
    *arguments, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    model, data, training = arguments
    check_arguments(model, data, training)
    return model, data, training


def _current_name(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{RENAMED_FLAGS[name]}{equals}{value}" if word.startswith("--") and name in RENAMED_FLAGS else word
