"""Command-line flags for the model and for sampling, and exit codes, of the programs that run a model.

Nothing here imports torch before the flags are parsed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava.constants import DTYPE_NAMES, FP8
from llava.conversation import conv_templates
from llava.files.terminal_text import log_to_terminal, report_error
from llava.inference.distributed import read_rank
from llava.inference.sampling import Sampling

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.inference.session import Session

logger = logging.getLogger(__name__)

REFUSED = 2
INTERRUPTED = 130
_DEVICE = re.compile(r"(cpu|mps|cuda|xpu|npu|hpu|mlu|mtia)(:\d+)?")


def add_model_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """Add the flags that `load_session` reads, with `--model-path` required or not."""
    add = parser.add_argument
    add(
        "--model-path",
        required=is_required,
        metavar="DIR",
        help="full, LoRA or projector checkpoint: directory or hub id",
    )
    add("--model-base", metavar="DIR", help="base of a LoRA or projector checkpoint (default: as recorded there)")
    add("--conv-mode", choices=sorted(conv_templates), metavar="NAME",
        help="prompt template (default: the one saved with the weights, else vicuna_v1)")  # fmt: skip
    add("--device", type=device_name, help="cuda, cuda:1, mps or cpu (default: the best available)")
    add("--dtype", choices=("auto", *DTYPE_NAMES), default="auto", help="weights and computation (default: by device)")
    add("--vision-tower", metavar="DIR", help="vision tower, for checkpoints without one")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="8-bit weights, through bitsandbytes")
    bits.add_argument("--load-4bit", action="store_true", help="4-bit weights, through bitsandbytes")
    bits.add_argument("--fp8", action="store_true", help="FP8 weights and products, on Ada, Hopper and newer GPUs")


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int, seed: int | None = None
) -> None:
    """Add the flags of `Sampling`, with these defaults, in the original's spelling and with dashes."""
    add = parser.add_argument
    add("--temperature", type=float, default=temperature,
        help="0: greedy decoding; above 0: sampling, more random the higher (default: %(default)s)")  # fmt: skip
    add("--top_p", "--top-p", type=float,
        help="sample among the most likely tokens that together have this probability (default: all)")  # fmt: skip
    add("--num_beams", "--num-beams", type=int, default=1, help="beam search above 1 (default: %(default)s)")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens,
        help="longest answer, in tokens; the context may leave less (default: %(default)s)")  # fmt: skip
    add_seed_argument(parser, seed)


def add_seed_argument(parser: argparse.ArgumentParser, seed: int | None = None) -> None:
    """Add `--seed` with this default."""
    default = "random" if seed is None else str(seed)
    parser.add_argument("--seed", type=int, default=seed, metavar="N",
        help=f"random seed of sampling; the same N gives the same answers (default: {default})")  # fmt: skip


def selected_bits(args: argparse.Namespace) -> int | str:
    """Return the bits per weight that the flags request: 16, 8, 4 or "fp8"."""
    return FP8 if args.fp8 else 4 if args.load_4bit else 8 if args.load_8bit else 16


def load_session(args: argparse.Namespace, *, compiles: str | None = None) -> Session:
    """Log what the device computes with, and load the model that the flags of `add_model_arguments` name.

    Args:
        args: parsed flags.
        compiles: value of `--compile`; None = a chat, which decodes with Triton kernels instead.

    Raises:
        ValueError: if a flag asks for what the device doesn't have; further errors as in `Session.load`.
    """
    from llava.inference.session import Session  # takes seconds

    line = describe_machine(args, compiles)
    if read_rank().rank == 0:
        logger.info("%s", line)
    return Session.load(
        args.model_path,
        args.model_base,
        bits=selected_bits(args),
        device=args.device,
        dtype=args.dtype,
        vision_tower=args.vision_tower,
        conv_mode=args.conv_mode,
    )


def describe_machine(args: argparse.Namespace, compiles: str | None) -> str:
    """Return the line about the device that inference starts with; arguments and errors as of `load_session`."""
    from llava.model.capabilities import capabilities_of, feature  # takes seconds
    from llava.model.devices import best_device, parse_device, parse_dtype

    device = parse_device(args.device) if args.device else best_device()
    can, bits = capabilities_of(device), selected_bits(args)
    try:
        dtype = parse_dtype(args.dtype, device)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    is_fast = bits in (16, FP8)
    if compiles is None:
        graphs = feature("CUDA graphs", can.has_cuda_graphs and bits != 8)
        return can.describe(dtype, graphs, feature("Triton kernels", can.has_triton and is_fast))
    if compiles == "on" and (reason := can.refuse_compilation()):
        raise ValueError(f"--compile on: {reason}; leave it out")
    graphs = feature("CUDA graphs", can.has_cuda_graphs and is_fast and compiles != "off")
    if compiles == "auto" and can.has_triton and is_fast:
        return can.describe(dtype, graphs, "compilation in long runs")
    return can.describe(dtype, graphs, feature("compilation", compiles == "on"))


def parse_sampling(parser: argparse.ArgumentParser, args: argparse.Namespace, **fields: Any) -> Sampling:
    """Return the sampling that the flags request; a value out of range exits with a usage error.

    Args:
        parser: prints the usage error.
        args: parsed flags, named like the fields of `Sampling`.
        fields: values for which the program has no flag.
    """
    names = ("temperature", "top_p", "num_beams", "max_new_tokens", "seed")
    try:
        return Sampling(**{**{name: getattr(args, name) for name in names if name not in fields}, **fields})
    except ValueError as error:
        parser.error(f"--{error}")


def device_name(text: str) -> str:
    """Return the value of `--device`, if it is the name of a device; whether this machine has it, is not checked.

    Raises:
        argparse.ArgumentTypeError: if it is not.
    """
    if _DEVICE.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"device {text!r} is unknown; choose cpu, cuda, cuda:1 or mps")
    return text


def refuse_absent_device(parser: argparse.ArgumentParser, device: str | None) -> None:
    """Exit with a usage error if this machine lacks the device of `--device`.

    The last check of a program's flags, since it imports torch.
    """
    if device is None:
        return
    from llava.model.devices import parse_device

    try:
        parse_device(device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")


def run_program(action: Callable[[], int | None], *, refused: int = REFUSED) -> int:
    """Run a program with its log on stderr, and print an expected error as one message.

    Args:
        action: returns the exit code; None = 0.
        refused: exit code after an error.

    Returns:
        the exit code; 130 after Ctrl-C.
    """
    log_to_terminal()
    logging.getLogger("llava").setLevel(logging.INFO)
    try:
        return action() or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError) as error:
        report_error(error)
    except RuntimeError as error:
        from torch import OutOfMemoryError  # a RuntimeError of this kind comes from torch, which is imported then

        if not isinstance(error, OutOfMemoryError):
            raise
        report_error(f"out of memory ({str(error).splitlines()[0]}); pass --load-4bit or ask for less at a time")
    return refused
