"""Chat about images in a browser, with one model or two side by side, loaded here or served; see `--help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.files.home_directory import expand_homes
from llava.files.install_command import install_command
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

if TYPE_CHECKING:  # for annotations: they import Pillow and torch
    from llava.inference.sampling import Sampling
    from llava.inference.session import Session
    from llava.serve.model_chat import ModelChat

    CreateChat = Callable[[], ModelChat]

_EXAMPLES_SHOWN = 12
_LAST_PORT = 65_535
_MODELS_SHOWN = 2
_UPLOAD_FOLDER = "GRADIO_TEMP_DIR"  # the variable from which Gradio reads it
_SWEEP_SECONDS = 60.0  # between looks for conversations that have expired
_SERVED_AT_ONCE = 8  # answers of a server, which batches them
_OF_A_LOADED_MODEL = ("model_base", "conv_mode", "device", "vision_tower", "load_8bit", "load_4bit", "compare_with")
_EXAMPLE = """examples:
  python -m llava.serve.web --model-path llava_merged_model
  python -m llava.serve.web --model-path checkpoints/llava-v1.5-7b-task-lora --compare-with liuhaotian/llava-v1.5-7b \\
      --examples playground/data_infer/questions.jsonl --image-folder playground/data_infer/images
  python -m llava.serve.web --endpoint http://127.0.0.1:8000
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.serve.web",
        "Chat about images in a browser.",
        _EXAMPLE,
    )
    add_model_arguments(parser, is_required=False)
    add = parser.add_argument
    add("--compare-with", metavar="DIR", help="second model, which answers beside the first (its own base is found)")
    add("--endpoint", metavar="URL", type=_address,
        help="OpenAI-compatible server (transformers serve, vLLM, SGLang), whose model answers in place of a loaded "
        "one, or beside it; the variable OPENAI_API_KEY holds its key")  # fmt: skip
    add("--endpoint-model", nargs="+", default=[], metavar="NAME",
        help="model of --endpoint, or two side by side (default: the only one that it lists)")  # fmt: skip
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
    check_models(parser, args)
    sampling = parse_sampling(parser, args, top_p=None, num_beams=1)
    refuse_absent_device(parser, args.device)
    return run_program(lambda: _run(args, sampling))


def check_models(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage error if the flags name no model, more than two, or settings of a model that is not loaded."""
    if not (args.model_path or args.endpoint):
        parser.error("no model: pass --model-path DIR to load one, or --endpoint URL to ask one that is served")
    if args.endpoint_model and not args.endpoint:
        parser.error("--endpoint-model names a model of --endpoint URL; pass that too")
    given = [f"--{name.replace('_', '-')}" for name in _OF_A_LOADED_MODEL if getattr(args, name)]
    given += ["--dtype"] if args.dtype != "auto" else []
    if given and not args.model_path:
        parser.error(f"{given[0]} is about a model that is loaded here; pass --model-path too, or leave it out")
    n_models = sum(map(bool, (args.model_path, args.compare_with))) + max(len(args.endpoint_model), bool(args.endpoint))
    if n_models > _MODELS_SHOWN:
        parser.error(f"{n_models} models are named by --model-path, --compare-with and --endpoint; at most 2 are shown")


def _run(args: argparse.Namespace, sampling: Sampling) -> int:
    with _ends_on_sigterm(), own_folder() as folder:
        with _naming_the_extra():
            from llava.serve.web_page import build_page, launch
        from llava.serve.conversations import Conversation, Conversations

        check_address(args.host, args.port)
        examples = _read_examples(args.examples, args.image_folder) if args.examples else []
        models = find_models(args)
        conversations = Conversations(lambda: Conversation([create() for _, create in models], folder))
        names = [name for name, _ in models]
        at_once = 1 if args.model_path else _SERVED_AT_ONCE
        page = build_page(conversations, names, sampling, examples, at_once)
        _, address, public = launch(page, args.host, args.port, share=args.share, auth=args.auth)
        try:
            addresses = f"{address} and {public}" if public else address
            print_text(f"The chat is at {addresses}; Ctrl-C ends it.", flush=True)
            never = threading.Event()
            while not never.wait(_SWEEP_SECONDS):
                conversations.drop_expired()
        finally:
            page.close(verbose=False)
    return 0


@contextlib.contextmanager
def _naming_the_extra() -> Iterator[None]:
    """Let the error about a missing library name the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {install_command('web')}") from error


@contextlib.contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """End the program on SIGTERM as on Ctrl-C, so that uploads are deleted."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Create a folder for this page's uploads and images, away from those of other Gradio pages; it is deleted."""
    before = os.environ.get(_UPLOAD_FOLDER)
    with tempfile.TemporaryDirectory(prefix="llava-chat-", ignore_cleanup_errors=True) as folder:
        os.environ[_UPLOAD_FOLDER] = str(Path(folder, "uploads").resolve())
        try:
            yield Path(folder)
        finally:
            os.environ.pop(_UPLOAD_FOLDER)
            os.environ.update({_UPLOAD_FOLDER: before} if before else {})


def find_models(args: argparse.Namespace) -> list[tuple[str, CreateChat]]:
    """Return name and chats of each model that the flags name: loaded ones first, then served ones.

    Raises:
        OSError: if the server can't be reached, refuses the key or reports an error.
        ValueError: if a model has no vision tower, or the server has several models and none is chosen.
    """
    served = _find_served(args) if args.endpoint else []  # quick, so before a model is loaded
    loaded = _find_loaded(args) if args.model_path else []
    names = [name for name, _ in loaded]
    return loaded + [(f"{name} (served)" if name in names else name, create) for name, create in served]


def _find_served(args: argparse.Namespace) -> list[tuple[str, CreateChat]]:
    with _naming_the_extra():
        from llava.serve.endpoint import KEY_VARIABLE, Endpoint, EndpointChat, choose_models

    endpoint = Endpoint(args.endpoint, os.environ.get(KEY_VARIABLE))
    names = choose_models(endpoint, args.endpoint_model)
    return [(name.rstrip("/").rpartition("/")[2], lambda name=name: EndpointChat(endpoint, name)) for name in names]


def _find_loaded(args: argparse.Namespace) -> list[tuple[str, CreateChat]]:
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.local_chat import LocalChat

    paths = [path for path in (args.model_path, args.compare_with) if path]
    sessions = load_models(args)
    return [
        (get_model_name_from_path(path), lambda session=session: LocalChat(session))
        for path, session in zip(paths, sessions, strict=True)
    ]


def check_address(host: str, port: int) -> None:
    """Check that an address can be listened on, before a model is loaded.

    Raises:
        OSError: if it can't.
    """
    if not 0 <= port <= _LAST_PORT:  # getaddrinfo takes it modulo 65536
        raise OSError(f"can't listen on port {port} (ports are 0 to {_LAST_PORT}); choose another --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"can't listen on {host}, port {port} ({reason}); choose another --host or --port") from error


def load_models(args: argparse.Namespace) -> list[Session]:
    """Load the model of the flags, and the one to compare it with.

    Raises:
        ValueError: if one has no vision tower; further errors as `load_session`.
    """
    sessions = [_load(args)]
    if args.compare_with:
        sessions.append(
            _load(argparse.Namespace(**{**vars(args), "model_path": args.compare_with, "model_base": None}))
        )
    return sessions


def _load(args: argparse.Namespace) -> Session:
    session = load_session(args)
    if session.image_processor is None:
        raise ValueError(f"{args.model_path} has no vision tower, so it can't see images; pass --vision-tower DIR")
    return session


def _read_examples(path: str, image_folder: str) -> list[tuple[str, str]]:
    try:
        questions = [question for question in read_questions(path) if question.images]
    except ValueError as error:  # it names the flag of batch inference
        raise ValueError(str(error).replace("--question-file", "--examples")) from error
    found = [(str(resolve_image(image_folder, question.images[0])), question.text) for question in questions]
    return [(image, text) for image, text in found if Path(image).is_file()][:_EXAMPLES_SHOWN]


def _address(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if scheme not in ("http", "https") or not separator or not rest.strip("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like http://127.0.0.1:8000")
    return text


def _user(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("give a name and a password as USER:PASSWORD")
    return user, password


if __name__ == "__main__":
    raise SystemExit(main())
