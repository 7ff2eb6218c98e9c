"""Chat about images in a browser, with one model or two side by side; `--help` lists the flags."""

from __future__ import annotations

import argparse
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.files.home_directory import expand_homes
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.image_files.paths import resolve_image
from llava.inference.batch.questions import read_questions
from llava.inference.command_line import (
    add_model_arguments,
    add_seed_argument,
    load_session,
    parse_sampling,
    refuse_absent_device,
    run_program,
)

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.inference.session import Session

_EXAMPLES_SHOWN = 12
_EXAMPLE = """examples:
  python -m llava.serve.web --model-path llava_merged_model
  python -m llava.serve.web --model-path checkpoints/llava-v1.5-7b-task-lora --compare-with liuhaotian/llava-v1.5-7b \\
      --examples playground/data_infer/questions.jsonl --image-folder playground/data_infer/images
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.serve.web",
        "Chat about images in a browser.",
        _EXAMPLE,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--compare-with", metavar="DIR", help="second model, which answers beside the first (its own base is found)")
    add("--examples", metavar="FILE", help="question file whose first questions are offered as examples")
    add("--image-folder", metavar="DIR", default="", help="images of --examples")
    add("--temperature", type=float, default=0.0, help="at the start: 0 = greedy decoding (default: %(default)s)")
    add("--max-new-tokens", type=int, default=512, help="at the start: longest answer, in tokens (default: 512)")
    add_seed_argument(parser)
    add(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine (default: this machine)"
    )
    add("--port", type=int, default=7860, help="0: a free one (default: %(default)s)")
    add("--share", action="store_true", help="public address for 72 hours, through Gradio's servers")
    add("--auth", metavar="USER:PASSWORD", type=_user, help="login (default: none)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 2 after an error at the start, 130 after Ctrl-C.
    """
    parser = build_parser()
    args = expand_homes(
        parser.parse_args(argv), "model_path", "model_base", "vision_tower", "compare_with", "examples", "image_folder"
    )
    sampling = parse_sampling(parser, args, top_p=None, num_beams=1)
    refuse_absent_device(parser, args.device)
    return run_program(lambda: _run(args, sampling))


def _run(args: argparse.Namespace, sampling: object) -> int:
    try:
        from llava.serve.web_page import build_page, launch
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install -e ".[web]"') from error

    from llava.mm_utils import get_model_name_from_path  # takes seconds: flags are parsed first
    from llava.serve.conversations import Conversation, Conversations

    check_address(args.host, args.port)
    examples = _read_examples(args.examples, args.image_folder) if args.examples else []
    paths = [args.model_path, *([args.compare_with] if args.compare_with else [])]
    sessions = load_models(args)
    names = [get_model_name_from_path(path) for path in paths]
    with tempfile.TemporaryDirectory(prefix="llava-chat-") as folder:
        page = build_page(Conversations(lambda: Conversation(sessions, Path(folder))), names, sampling, examples)
        _, address, public = launch(page, args.host, args.port, share=args.share, auth=args.auth)
        print_text(f"The chat is at {address}" + (f" and {public}" if public else "") + "; Ctrl-C ends it.")
        page.block_thread()
    return 0


def check_address(host: str, port: int) -> None:
    """Check that an address can be listened on, before a model is loaded.

    Raises:
        OSError: if it can't.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"can't listen on {host}, port {port} ({reason}); choose another --host or --port") from error


def load_models(args: argparse.Namespace) -> list[Session]:
    """Load the model of the flags, and the one to compare it with."""
    sessions = [load_session(args)]
    if args.compare_with:
        other = argparse.Namespace(**{**vars(args), "model_path": args.compare_with, "model_base": None})
        sessions.append(load_session(other))
    return sessions


def _read_examples(path: str, image_folder: str) -> list[tuple[str, str]]:
    questions = [question for question in read_questions(path) if question.images]
    found = [(str(resolve_image(image_folder, question.images[0])), question.text) for question in questions]
    return [(image, text) for image, text in found if Path(image).is_file()][:_EXAMPLES_SHOWN]


def _user(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("give a name and a password as USER:PASSWORD")
    return user, password


if __name__ == "__main__":
    raise SystemExit(main())
