"""Answer one question about one or several images: `eval_model` in Python, `--help` for the command line."""

from __future__ import annotations

import argparse
import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, FP8, IMAGE_PLACEHOLDER
from llava.files.home_directory import expand_homes
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import (
    add_model_arguments,
    add_sampling_arguments,
    parse_sampling,
    refuse_absent_device,
    run_program,
)
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

if TYPE_CHECKING:  # for annotations: they import torch
    from llava.inference.batch.fingerprint import ModelSources
    from llava.inference.session import Session

__getattr__ = lazy_names(__name__)

_EXAMPLE = """example:
  python -m llava.eval.run_llava --model-path llava_merged_model --image-file photo.jpg --query "What is this?"

Each <image-placeholder> in the query stands for an image; without one, the images come before the query.
"""


_LOADING = threading.Lock()
"""Held while a model is looked up or loaded, so that concurrent calls load it once."""


def eval_model(args: Any) -> str:
    """Ask a model one question, print the answer and return it.

    Repeated calls with the same model reuse the loaded weights.

    Args:
        args: any object with `model_path`, `model_base`, `query`, `image_file` (paths or http(s) addresses between
            `sep`; None or "" = none), `conv_mode`, `sep`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`;
            optionally also `device`, `dtype`, `vision_tower`, `load_8bit`, `load_4bit`, `seed`. Other attributes,
            `model_name` among them, have no effect.

    Returns:
        the answer, without spaces around it.

    Raises:
        FileNotFoundError: if a file of the model is missing.
        ImportError: if 4 or 8 bit are requested without bitsandbytes.
        ValueError: if the question, an image or an option can't be used.

    Example:
        >>> args = type("Args", (), {
        ...     "model_path": "llava_merged_model", "model_base": None, "query": "What is this?", "conv_mode": None,
        ...     "image_file": "photo.jpg", "sep": ",", "temperature": 0, "top_p": None, "num_beams": 1,
        ...     "max_new_tokens": 512})()
        >>> answer = eval_model(args)
    """
    from llava.inference.chat.chat import answer_one  # takes seconds: the program parses its flags first
    from llava.inference.load_image import load_image, split_locations

    sampling = Sampling(
        temperature=args.temperature or 0.0,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        seed=getattr(args, "seed", None),
    )
    images = [load_image(location) for location in split_locations(args.image_file or "", args.sep)]
    question = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    session = _load(args).with_template(args.conv_mode)
    answer = answer_one(session, question, images, sampling)
    print_text(answer)
    return answer


def _load(args: Any) -> Session:
    from llava.inference.batch.fingerprint import ModelSources

    # The README's object has none of these: they came later.
    options = {name: getattr(args, name, None) for name in ("device", "dtype", "vision_tower")}
    bits = 4 if getattr(args, "load_4bit", False) else 8 if getattr(args, "load_8bit", False) else 16
    bits = FP8 if getattr(args, "fp8", False) else bits
    sources = ModelSources.find(args.model_path, args.model_base, options["vision_tower"])
    with _LOADING:
        fingerprints = _fingerprints(sources, sources.stamps())
        return _load_session(args.model_path, args.model_base, fingerprints, bits, **options)


@functools.lru_cache(maxsize=1)
def _fingerprints(sources: ModelSources, stamps: tuple[tuple[Any, ...], ...]) -> tuple[str | None, ...]:
    """Return the fingerprints of the model's files; files are read again only where their `stamps` changed."""
    return tuple(sources.fingerprints().values())


@functools.lru_cache(maxsize=1)
def _load_session(
    model_path: str,
    model_base: str | None,
    fingerprints: tuple[str | None, ...],
    bits: int | str,
    device: str | None,
    dtype: str | None,
    vision_tower: str | None,
) -> Session:
    """Load a model, or return the last one if it is the same; `fingerprints` change with the files.

    The cache is the one piece of state in this module: the original's `eval_model(args)` has nowhere else to keep 14 GB
    of weights between two calls. It holds one model.
    """
    from llava.inference.session import Session

    _load_session.cache_clear()  # free the previous model first: two may not fit on the device
    return Session.load(model_path, model_base, bits=bits, device=device, dtype=dtype, vision_tower=vision_tower)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.run_llava",
        "Answer one question about images.",
        _EXAMPLE,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--image-file",
        required=True,
        metavar="PATH",
        help="paths or http(s) addresses of images, separated by --sep",
    )
    add("--query", required=True, metavar="TEXT", help="the question")
    add("--sep", default=",", help="separator of several images (default: a comma)")
    add_sampling_arguments(parser, temperature=0.2, max_new_tokens=512)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 after an error.
    """
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "model_path", "model_base", "vision_tower")
    parse_sampling(parser, args)  # an error here is wrong usage, exit code 2
    refuse_absent_device(parser, args.device)

    def run() -> int:
        eval_model(args)
        return 0

    return run_program(run)


if __name__ == "__main__":
    raise SystemExit(main())
