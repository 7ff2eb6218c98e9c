"""Terminal chat about an image; `--help` lists the flags, `/help` in the chat its commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.files.home_directory import expand_homes
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text, report_error, show
from llava.inference.command_line import (
    add_model_arguments,
    add_seed_argument,
    load_session,
    parse_sampling,
    refuse_absent_device,
    run_program,
)
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

if TYPE_CHECKING:  # for annotations: they import Pillow and torch
    from PIL import Image

    from llava.inference.chat.chat import Chat

__getattr__ = lazy_names(__name__)

_EXAMPLE = """example:
  python -m llava.serve.cli --model-path llava_merged_model --image-file photo.jpg --load-4bit
"""
_HELP = """/image PATH   start a new conversation about another image (path or http(s) address)
/reset        start a new conversation about the same image
/tokens N     limit answers to N tokens
/help         this list
/exit         leave the chat, as Ctrl-D and Ctrl-C do; during an answer Ctrl-C stops the answer"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.serve.cli",
        "Chat with a model about an image in the terminal.",
        _EXAMPLE + "\ncommands in the chat:\n" + _HELP,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image-file", metavar="PATH", help="path or http(s) address (default: no image)")
    add(
        "--image-aspect-ratio",
        metavar="NAME",
        help="only the value the weights were trained with is accepted (default: that value)",
    )
    add("--temperature", type=float, default=0.2,
        help="0: greedy decoding; above 0: sampling, more random the higher (default: %(default)s)")  # fmt: skip
    add("--max-new-tokens", type=int, default=512,
        help="longest answer, in tokens; at most the rest of the context (default: %(default)s)")  # fmt: skip
    add_seed_argument(parser)
    add("--debug", action="store_true", help="after each answer, print the token ids of the conversation on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 after an error at the start.
    """
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "model_path", "model_base", "vision_tower")
    sampling = parse_sampling(parser, args, top_p=None, num_beams=1)
    refuse_absent_device(parser, args.device)
    return run_program(lambda: _run(args, sampling))


def _run(args: argparse.Namespace, sampling: Sampling) -> int:
    from llava.inference.chat.chat import Chat  # takes seconds: flags are parsed first
    from llava.inference.load_image import load_image

    images = [load_image(args.image_file)] if args.image_file else []
    session = load_session(args)
    trained = session.model.config.image_aspect_ratio
    if args.image_aspect_ratio not in (None, trained):
        raise ValueError(
            f"--image-aspect-ratio is {args.image_aspect_ratio}, but the weights were trained with {trained}; "
            "leave the flag out"
        )
    if args.debug:
        logging.getLogger("llava").setLevel(logging.DEBUG)
    Terminal(Chat(session, sampling), images, show_ids=args.debug).run()
    return 0


class Terminal:
    """Read-eval-print loop of a conversation: lines typed by the user, answers streamed by the model.

    Args:
        chat: the conversation.
        images: sent with its first question.
        show_ids: after each answer, print the token ids so far on stderr.
    """

    def __init__(self, chat: Chat, images: list[Image.Image], *, show_ids: bool = False) -> None:
        self.chat = chat
        self.images = images
        self.show_ids = show_ids
        self.is_open = True

    def run(self) -> None:
        """Read lines and answer them until /exit, Ctrl-D or Ctrl-C."""
        user, _ = self.chat.session.template.roles
        print("Type a question, or /help.")
        while self.is_open:
            try:
                line = input(f"{user or 'USER'}: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                self.run_command(line)
            elif line:
                self.ask(line)

    def run_command(self, line: str) -> None:
        """Run a command, a line that starts with a slash."""
        command, _, argument = line.partition(" ")
        if command == "/exit":
            self.is_open = False
        elif command == "/help":
            print(_HELP)
        elif command == "/reset":
            self.chat.reset()
            print("New conversation.")
        elif command == "/image" and argument.strip():
            self.change_image(argument.strip())
        elif command == "/tokens" and argument.strip():
            self.change_limit(argument.strip())
        else:
            report_error(f"{show(line)} is not a command; type /help")

    def change_image(self, location: str) -> None:
        """Start a new conversation about another image; one that can't be read changes nothing."""
        from llava.inference.load_image import load_image

        try:
            images = [load_image(location)]
        except ValueError as error:
            report_error(str(error))
            return
        self.images = images
        self.chat.reset()
        print_text(f"New conversation about {location}.")

    def change_limit(self, text: str) -> None:
        """Set the longest answer in tokens; a text that is not a number above 0 changes nothing."""
        if not (text.isascii() and text.isdigit() and int(text)):
            report_error(f"/tokens {text}: give a whole number of tokens, 1 or more")
            return
        self.chat.sampling = dataclasses.replace(self.chat.sampling, max_new_tokens=int(text))
        print(f"Answers have at most {int(text)} tokens.")

    def ask(self, question: str) -> None:
        """Stream the answer to a question."""
        _, assistant = self.chat.session.template.roles
        images = [] if self.chat.turns else self.images
        try:
            with contextlib.closing(self.chat.reply(question, images)) as pieces:
                print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
                for piece in pieces:
                    print_text(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except ValueError as error:
            report_error(f"{error}; /reset starts a new conversation")
        if self.show_ids:
            print(f"{self.chat.computed_positions} positions computed; token ids: {self.chat.ids}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
