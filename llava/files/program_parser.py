"""Parsers of programs, most of which have two spellings: `llava NAME`, and the file or module that runs it."""

from __future__ import annotations

import argparse
import re
import sys

ONE_COMMAND = "llava"
_STARTED = re.compile(rf"{ONE_COMMAND} [\w-]+")


def program_name(spelling: str) -> str:
    """Return what a program is called: `llava NAME`, which that command puts into `sys.argv`, or else `spelling`."""
    return sys.argv[0] if _STARTED.fullmatch(sys.argv[0]) else spelling


def program_parser(spelling: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser without flags, whose `--help` calls the program as it was started, in the examples too.

    Args:
        spelling: how it is started without the command `llava`, such as "python -m llava.model.plan".
        description: text above the flags.
        epilog: text below the flags.
    """
    name = program_name(spelling)
    return argparse.ArgumentParser(
        prog=name,
        description=description.replace(spelling, name),
        epilog=epilog and epilog.replace(spelling, name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
