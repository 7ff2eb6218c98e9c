"""What the programs that ask a model share: flags for the model and for sampling, and how they report errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from llava.conversation import conv_templates
from llava.inference.session import Sampling, Session
from llava.model.devices import DTYPES

REFUSED = 2
INTERRUPTED = 130


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `load_session` reads."""
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR", help="model, LoRA or projector directory, or hub id")
    add("--model-base", metavar="DIR", help="weights under a LoRA or projector directory (default: as recorded there)")
    add("--conv-mode", choices=sorted(conv_templates), metavar="NAME",
        help="prompt template (default: the one saved with the weights, else vicuna_v1)")  # fmt: skip
    add("--device", type=_device, help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and computation (default: the device's)")
    add("--vision-tower", metavar="DIR", help="image encoder, for weights that come without one")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="8 bit weights, through bitsandbytes")
    bits.add_argument("--load-4bit", action="store_true", help="4 bit weights, through bitsandbytes")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """Add the flags of `Sampling`, with these defaults, in the original's spelling and with dashes."""
    add = parser.add_argument
    add("--temperature", type=float, default=temperature,
        help="0 = the likeliest answer, above = the more by chance the higher (default: %(default)s)")  # fmt: skip
    add("--top_p", "--top-p", type=float,
        help="choose among the likeliest tokens that together have this probability (default: among all)")  # fmt: skip
    add("--num_beams", "--num-beams", type=int, default=1, help="beam search above 1 (default: %(default)s)")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens,
        help="longest answer, in tokens (default: %(default)s)")  # fmt: skip


def selected_bits(args: argparse.Namespace) -> int:
    """Return the bits per weight that the flags ask for."""
    return 4 if args.load_4bit else 8 if args.load_8bit else 16


def load_session(args: argparse.Namespace) -> Session:
    """Load the model that the flags of `add_model_arguments` name; errors as in `Session.load`."""
    return Session.load(
        args.model_path,
        args.model_base,
        bits=selected_bits(args),
        device=args.device,
        dtype=args.dtype,
        vision_tower=args.vision_tower,
        conv_mode=args.conv_mode,
    )


def parse_sampling(parser: argparse.ArgumentParser, args: argparse.Namespace, **fields: Any) -> Sampling:
    """Return the sampling that the flags ask for; a value out of range ends the program as wrong usage.

    Args:
        parser: reports the error.
        args: with flags of the names of `Sampling`'s fields.
        fields: instead of flags that the program does not have.
    """
    names = ("temperature", "top_p", "num_beams", "max_new_tokens")
    try:
        return Sampling(**{**{name: getattr(args, name) for name in names if name not in fields}, **fields})
    except ValueError as error:
        parser.error(f"--{error}")


def run_program(action: Callable[[], int | None], *, refused: int = REFUSED) -> int:
    """Run a program's work, with its log on stderr, and turn expected errors into one message.

    Args:
        action: returns the exit code; None = 0.
        refused: exit code after an error.

    Returns:
        the exit code; 130 after Ctrl-C.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llava").setLevel(logging.INFO)
    try:
        return action() or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        report_error(f"out of memory ({str(error).splitlines()[0]}); pass --load-4bit or ask for less at a time")
    except OSError as error:
        is_worded = error.strerror is None or error.filename is None
        place = f"{error.filename}: {error.strerror}; check the path, and that it may be read and written"
        report_error(str(error) if is_worded else place)
    except (ValueError, ImportError) as error:
        report_error(str(error))
    return refused


def report_error(message: str) -> None:
    """Print an error as all programs do."""
    print(f"error: {message}", file=sys.stderr)


def _device(name: str) -> str:
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device; choose cuda, cuda:1, mps or cpu") from None
    is_there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(kind)
    if is_there is not None and not is_there():
        raise argparse.ArgumentTypeError(f"{name} is not available here; choose another or leave the flag out")
    return name
