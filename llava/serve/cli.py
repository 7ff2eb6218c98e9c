"""A chat about an image in the terminal; `--help` shows the options, `/help` inside what can be typed."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from PIL import Image

from llava.inference.chat import Chat
from llava.inference.command_line import (
    add_model_arguments,
    load_session,
    parse_sampling,
    report_error,
    run_program,
)
from llava.inference.images import load_image
from llava.inference.session import Sampling

_EXAMPLE = """example:
  python -m llava.serve.cli --model-path llava_merged_model --image-file photo.jpg --load-4bit
"""
_HELP = """/image PATH   talk about another picture (path or http(s) address); the dialogue starts anew
/reset        start anew about the same picture
/help         this list
/exit         end (or Ctrl-D); Ctrl-C ends too, or breaks an answer off"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Talk with a model about an image, in the terminal.",
        epilog=_EXAMPLE + "\nin the chat:\n" + _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image-file", metavar="PATH", help="path or http(s) address (default: talk without an image)")
    add(
        "--image-aspect-ratio",
        metavar="NAME",
        help="has to be what the weights were trained with, which is the default",
    )
    add("--temperature", type=float, default=0.2,
        help="0 = the likeliest answer, above = the more by chance the higher (default: %(default)s)")  # fmt: skip
    add("--max-new-tokens", type=int, default=512, help="longest answer, in tokens (default: %(default)s)")
    add("--debug", action="store_true", help="show on stderr, after each answer, what the model has read and written")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 after an error at the start.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    sampling = parse_sampling(parser, args, top_p=None, num_beams=1)
    return run_program(lambda: _run(args, sampling))


def _run(args: argparse.Namespace, sampling: Sampling) -> int:
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
    """Reads what the user types and prints what the model says.

    Args:
        chat: the dialogue.
        images: pictures it is about.
        show_ids: print on stderr what the model has read and written, after each answer.
    """

    def __init__(self, chat: Chat, images: list[Image.Image], *, show_ids: bool = False) -> None:
        self.chat = chat
        self.images = images
        self.show_ids = show_ids
        self.is_open = True

    def run(self) -> None:
        """Go on until the user ends it."""
        user, _ = self.chat.session.template.roles
        print("Type a question, or /help.")
        while self.is_open:
            try:
                line = input(f"{user or 'USER'}: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                self.obey(line)
            elif line:
                self.ask(line)

    def obey(self, line: str) -> None:
        """Carry out a line that starts with a slash."""
        command, _, argument = line.partition(" ")
        if command == "/exit":
            self.is_open = False
        elif command == "/help":
            print(_HELP)
        elif command == "/reset":
            self.chat.reset()
            print("The dialogue starts anew.")
        elif command == "/image" and argument.strip():
            self.change_image(argument.strip())
        else:
            report_error(f"{line!r} is no command; type /help")

    def change_image(self, location: str) -> None:
        """Start anew about another picture; if that can't be read, everything stays as it is."""
        try:
            images = [load_image(location)]
        except ValueError as error:
            report_error(str(error))
            return
        self.images = images
        self.chat.reset()
        print(f"The dialogue starts anew, about {location}.")

    def ask(self, question: str) -> None:
        """Print the answer to a question as it comes."""
        _, assistant = self.chat.session.template.roles
        images = [] if self.chat.turns else self.images
        try:
            with contextlib.closing(self.chat.reply(question, images)) as pieces:
                print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
                for piece in pieces:
                    print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (broken off)")
        except ValueError as error:
            report_error(f"{error}; /reset starts anew")
        if self.show_ids:
            print(f"{self.chat.fed_tokens} positions computed; ids so far: {self.chat.ids}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
