"""The command `llava`, also as `python -m llava`: each of its commands runs a program that has a spelling of its own.

`COMMANDS` is the table; a program is imported when its command is given, so that `--help` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from llava.files.program_parser import ONE_COMMAND
from llava.files.terminal_text import report_error

WRONG_USAGE = 2
_USAGE = f"usage: {ONE_COMMAND} COMMAND [flags]"


class Command(NamedTuple):
    """A command: the module whose `main(argv)` it runs, and what it does, in a line."""

    module: str
    summary: str


SECTIONS = {
    "teach a model your questions": {
        "prepare": Command("llava.data.table.prepare", "turn a table of questions into training records"),
        "check": Command("llava.data.doctor.__main__", "check every row and image before a GPU is held"),
        "plan": Command("llava.model.plan", "tell what memory and time a run needs, and a setup that fits"),
        "train": Command("llava.train.launch.task_lora", "LoRA-finetune LLaVA-1.5 on all GPUs of this machine"),
        "merge": Command("llava.export.merge", "write adapter and base as one checkpoint"),
    },
    "see what it learnt": {
        "answer": Command("llava.eval.model_vqa_loader", "answer a file of questions, or a table"),
        "score": Command("llava.eval.vqa_score", "accuracy with intervals; compare models"),
        "report": Command("llava.eval.report.__main__", "page with scores and images, wrong answers first"),
    },
    "talk to it": {
        "chat": Command("llava.serve.cli", "chat about an image in the terminal"),
        "web": Command("llava.serve.web", "chat in a browser, with one model or two side by side"),
    },
    "take it elsewhere": {
        "convert": Command("llava.export.convert", "write it for transformers, vLLM and SGLang, or back"),
        "quantize": Command("llava.export.quantize", "write it in 4 or 8 bit"),
        "push": Command("llava.export.push", "upload it to the Hugging Face Hub, with a model card"),
    },
    "compare it with others": {
        "eval": Command("llava.eval.suite", "measure it on public benchmarks"),
    },
}
"""Commands in the order of the job."""
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the other words as its flags; return its exit code."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return run(name, words)
    if name == "help" and words[:1] and words[0] in COMMANDS:
        return run(words[0], ["--help"])
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(ONE_COMMAND, importlib.import_module("llava").__version__)
        return 0
    print(_USAGE if name else help_text(), file=sys.stderr)
    report_error(_describe_unknown(name))
    return WRONG_USAGE


def run(name: str, words: Sequence[str]) -> int:
    """Import the program of a command and run it; `sys.argv` names the command while it runs.

    Args:
        name: key of `COMMANDS`.
        words: the program's flags.

    Returns:
        the program's exit code.
    """
    program = importlib.import_module(COMMANDS[name].module)
    former, sys.argv = sys.argv, [f"{ONE_COMMAND} {name}", *words]
    try:
        return program.main(list(words))
    finally:
        sys.argv = former


def help_text() -> str:
    """Return the table of contents that `--help` prints."""
    lines = [_USAGE, "", "Teach LLaVA-1.5 to answer your questions about images, and use what it learnt."]
    for title, section in SECTIONS.items():
        lines += ["", f"{title}:", *(f"  {name:10}{command.summary}" for name, command in section.items())]
    return "\n".join([*lines, "", f"{ONE_COMMAND} COMMAND --help lists the flags of a command, with examples."])


def _describe_unknown(name: str) -> str:
    if not name:
        return f"no command is given; name one, such as {ONE_COMMAND} check"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    way_out = f"did you mean {ONE_COMMAND} {near[0]}?" if near else f"{ONE_COMMAND} --help lists the commands"
    return f"{ONE_COMMAND} has no command {name}; {way_out}"


if __name__ == "__main__":
    sys.exit(main())
