"""Measure the data doctor: the whole program on a table's rows without decoding, and decoding of images alone.

The rows are the table's; its images need not be there, an empty file stands for each. For decoding, images of
640 x 480 pixels with noise are made.

Example: python benchmarks/doctor_speed.py --input playground/data_train/Train_Qs.csv --runs 5
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from preprocess_speed import ROOT, build_parser, parse

MODEL = ROOT / "tests/data/goldens/llava-v1.5-golden"


def measure(name: str, action: Callable[[], object], runs: int) -> None:
    """Print median and range of the seconds that `action` takes, and of those that cores work for it."""
    seconds, work = [], []
    for _ in range(runs):
        start, worked = time.perf_counter(), _core_seconds()
        action()
        seconds.append(time.perf_counter() - start)
        work.append(_core_seconds() - worked)
    low, high = min(seconds), max(seconds)
    print(
        f"{name:44} median {statistics.median(seconds):6.2f} s   ({low:.2f} to {high:.2f}, {runs} runs); "
        f"cores worked {statistics.median(work):.2f} s",
        flush=True,
    )


def _core_seconds() -> float:
    """Seconds of this process and of those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_data(table: Path, directory: Path) -> int:
    """Write `data.json` and an empty file for each image into a directory; return the number of rows."""
    from llava.data.table.read import read_table
    from llava.data.table.write import format_training_json

    rows = read_table(table).rows
    with (directory / "data.json").open("w", encoding="utf-8") as stream:
        stream.writelines(format_training_json(rows))
    (directory / "images").mkdir()
    for name in {row.image for row in rows}:
        (directory / "images" / name).touch()
    return len(rows)


def make_images(directory: Path, count: int) -> list[Path]:
    """Write JPEG files of 640 x 480 pixels and return their paths."""
    from PIL import Image

    paths = [directory / f"{number}.jpg" for number in range(count)]
    for path in paths:
        Image.effect_noise((640, 480), 40).convert("RGB").save(path, quality=90)
    return paths


def run_doctor(directory: Path, *flags: str) -> None:
    """Run the program in a process of its own; that it finds something is no error here."""
    command = [sys.executable, "-m", "llava.data.doctor", "--data_path", str(directory / "data.json")]
    command += ["--image_folder", str(directory / "images"), "--skip_decoding", *flags]
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in (0, 1):
        raise RuntimeError(f"the doctor ended with {code}; run it by hand: {' '.join(command)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print medians and ranges in seconds; return the exit code."""
    parser = build_parser(__doc__, runs=5)
    parser.add_argument("--model_name_or_path", default=str(MODEL), help="its tokenizer is used")
    parser.add_argument("--images", type=int, default=1000, help="images to decode (default: %(default)s)")
    args = parse(parser, argv)
    sys.path.insert(0, str(ROOT))
    from llava.data.doctor.images import check_images
    from llava.data.worker_processes import usable_cores

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows = make_data(args.input, directory)
        print(f"{args.input}: {rows:,} rows; Python {platform.python_version()}, {os.cpu_count()} CPUs")
        measure("program, without tokens and decoding", lambda: run_doctor(directory), args.runs)
        with_tokens = ("--model_name_or_path", args.model_name_or_path)
        measure("program, with tokens, without decoding", lambda: run_doctor(directory, *with_tokens), args.runs)
        images = make_images(directory, args.images)
        for workers in sorted({1, usable_cores()}):
            measure(
                f"decoding {args.images:,} images, {workers} process(es)",
                lambda workers=workers: check_images(images, workers=workers),
                args.runs,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
