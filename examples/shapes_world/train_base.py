"""Train playground/llava-tiny from scratch: its tokenizer, vision tower, projector and language model, all at once.

The base learns what stands where and what it looks like. It never meets a question about numbers, relations between
things or comparisons: those are the task that finetuning teaches. Minutes on a GPU, hours on a CPU.

Example: python examples/shapes_world/train_base.py --output playground/llava-tiny
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "playground/llava-tiny", help="directory to write")
    parser.add_argument("--scenes", type=int, default=30_000, help="training scenes")
    parser.add_argument("--exam_scenes", type=int, default=2_000, help="unseen scenes for the table at the end")
    parser.add_argument("--steps", type=int, default=3_500, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=192, help="scenes per step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="at its highest")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the scenes")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="for drawing the scenes")
    parser.add_argument("--exam_only", action="store_true", help="only examine the model that --output holds already")
    arguments = parser.parse_args(argv)
    if not arguments.exam_only and not is_free(arguments.output):
        parser.error(f"--output {arguments.output} holds something else than a model; choose another --output")
    return arguments


def is_free(directory: Path) -> bool:
    """Tell whether a model may be written there: nothing is there, or an earlier model."""
    if not directory.exists() or (directory / "config.json").is_file():
        return True
    return directory.is_dir() and not any(directory.iterdir())


def main(argv: Sequence[str] | None = None) -> int:
    """Train, examine, write the directory; returns the exit code."""
    arguments = parse_arguments(argv)

    from base_training import examine_directory, train_directory  # takes seconds: flags are parsed first

    if arguments.exam_only:
        print(examine_directory(arguments))
    else:
        train_directory(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
