"""Parse and check the command line of training: wrong flags are refused before transformers and torch are imported."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.files.program_parser import program_name
from llava.train.flags.arguments import DataArguments, ModelArguments, TrainingFlags, renamed_flags
from llava.train.flags.check_arguments import check_arguments
from llava.train.flags.check_device import check_device
from llava.train.flags.dropped_flags import settle_dropped_flags
from llava.train.flags.overwrites import refuse_overwrites
from llava.train.flags.transformers_flags import NotReadable, read_fields, read_parser

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.train.flags.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)

_USAGE = "%(prog)s --data_path FILE --output_dir DIR [further flags, which --help lists]"
NEWER_FLAGS = ("dataloader_multiprocessing_context", "dataloader_in_order")
"""Flags that only newer supported versions of transformers have."""


def parse_arguments(argv: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line.

    Raises:
        ValueError: if a flag is unknown, lacks its file or contradicts another, or the run would overwrite an input;
            the message names the flag and what to do.
        SystemExit: after `--help`, or if a value is not of its flag's type.
    """
    words = sys.argv[1:] if argv is None else argv
    refuse_early(words)
    words, notes = settle_dropped_flags(words)

    from transformers import HfArgumentParser  # takes seconds, as everything below does

    from llava.train.flags.requirements import check_requirements
    from llava.train.flags.training_arguments import TrainingArguments

    model, data, training = _parse(words, HfArgumentParser, TrainingArguments)
    for note in notes:
        logger.info("%s", note)
    check_arguments(model, data, training)
    check_device(training)
    refuse_overwrites(model, data, training)
    check_requirements(training)
    return model, data, training


def early_training_arguments() -> type:
    """Return a dataclass with the fields of `TrainingArguments`, without its methods and without importing torch.

    Raises:
        NotReadable: if the fields of transformers' class can't be read from its source.
    """
    return dataclass(type("TrainingArguments", (TrainingFlags, read_fields()), {}))


def build_parser(parser: type[ArgumentParser], training: type) -> ArgumentParser:
    """Return the parser of the command line.

    Args:
        parser: `HfArgumentParser`.
        training: `TrainingArguments`, or `early_training_arguments()`.
    """
    return parser((ModelArguments, DataArguments, training), prog=program_name("train_mem.py"), usage=_USAGE)


def refuse_early(words: Sequence[str]) -> None:
    """Answer `--help`, and refuse what can be refused without torch.

    Raises:
        ValueError, SystemExit: as `parse_arguments`.
    """
    words, _ = settle_dropped_flags(words)
    try:
        parser, training = read_parser(), early_training_arguments()
    except NotReadable as error:
        logger.debug("flags are checked after transformers is imported: %s", error)
        return
    arguments = _parse(words, parser, training)
    check_arguments(*arguments)
    refuse_overwrites(*arguments)


def _parse(words: Sequence[str], parser_type: type[ArgumentParser], training: type) -> tuple[Any, Any, Any]:
    parser = build_parser(parser_type, training)
    known = {action.dest for action in parser._actions}
    model, data, training, unknown = parser.parse_args_into_dataclasses(
        [_current_name(word, known) for word in words], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_describe_unknown(unknown[0], parser))
    return model, data, training


def _describe_unknown(word: str, parser: ArgumentParser) -> str:
    if _flag_name(word) in NEWER_FLAGS:
        version = importlib.metadata.version("transformers")
        return f"{word} is not known to transformers {version}; pip install --upgrade transformers"
    if not word.startswith("-"):
        return f"{word} follows no flag that takes it; see --help"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _flag_name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _current_name(word: str, known: Collection[str]) -> str:
    name, renamed = _flag_name(word), renamed_flags(known)
    if not word.startswith("--") or name not in renamed:
        return word
    _, equals, value = word.partition("=")
    return f"--{renamed[name]}{equals}{value}"
