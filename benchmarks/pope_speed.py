#!/usr/bin/env python3
"""Measure POPE by the suite against one question at a time, with a small model on the CPU.

The questions are those of POPE's question file, or of the part of it that is given; the images are drawn, under the
names of COCO's, one for each image of the file. The suite reads, answers, journals and scores; one at a time is
transformers' `generate` for each question and its image. Loading the model counts in neither, but in the suite's
processor time. Ways take turns, the median of the rounds counts, and the answers are compared. Where other programs run
beside, a second of processor time says more than one of the clock.

Example: python benchmarks/pope_speed.py --pope playground/data/eval/pope --output benchmarks/results/pope_speed.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava.eval import suite
from llava.files.overwrite_check import find_overwrite, output_file
from llava.inference.batch.generate_fallback import generate_answers
from llava.inference.batch.questions import Question, read_questions
from llava.inference.sampling import Sampling
from llava.inference.session import Session

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples" / "shapes_world")]

from drawing import draw_scene, encode_jpeg  # noqa: E402 (programs, found by the path above)
from infer_tiny import describe_machine  # noqa: E402
from scenes import sample_scene  # noqa: E402

QUESTION_FILE = "llava_pope_test.jsonl"
CANVAS = 448  # pixels of an image's side; COCO's images have 640 x 480
SUITE, ALONE = "suite", "`generate`, one at a time"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        questions = lay_out(options.pope, Path(folder), options.questions)
        rows = measure(options.model, questions, Path(folder), options.rounds)
    report = {
        "machine": describe_machine(),
        "model": options.model.name,
        "questions": len(questions),
        "images": len({question.images for question in questions}),
        "rounds": options.rounds,
        "rows": rows,
    }
    print(f"{report['machine']}\n{len(questions)} questions about {report['images']} drawn images\n")
    print("| way | questions/s | of processor time | same answers |\n| --- | --- | --- | --- |")
    for row in rows:
        rates = f"{row['questions_per_second']:.1f} | {row['questions_per_processor_second']:.1f}"
        print(f"| {row['way']} | {rates} | {row['same_answers']:.2%} |")
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pope", type=Path, required=True, metavar="DIR", help=f"folder of {QUESTION_FILE} and coco/")
    add("--model", type=Path, default=ROOT / "playground/llava-tiny", help="directory (default: %(default)s)")
    add("--questions", type=int, metavar="N", help="only the first N (default: all)")
    add("--rounds", type=int, default=3, help="of every way (default: %(default)s)")
    add("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    add("--output", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    if options.output and (
        message := find_overwrite({"--output": output_file(options.output)}, {"--pope": options.pope})
    ):
        parser.error(message)
    return options


def lay_out(pope: Path, data: Path, limit: int | None) -> list[Question]:
    """Write the suite's folder of POPE with drawn images, and return its questions."""
    folder = data / "pope"
    shutil.copytree(pope / "coco", folder / "coco", copy_function=shutil.copyfile)
    lines = (pope / QUESTION_FILE).read_text(encoding="utf-8").splitlines(keepends=True)[:limit]
    (folder / QUESTION_FILE).write_text("".join(lines), encoding="utf-8")
    questions = read_questions(folder / QUESTION_FILE)
    images, rng = folder / "val2014", random.Random(0)
    images.mkdir()
    for name in dict.fromkeys(name for question in questions for name in question.images):
        (images / name).write_bytes(encode_jpeg(draw_scene(sample_scene(rng), CANVAS), 90))
    return questions


def measure(model: Path, questions: Sequence[Question], data: Path, rounds: int) -> list[dict[str, Any]]:
    """Return for each way its questions a second, and the share of its answers that are those of one at a time."""
    session = Session.load(str(model), device="cpu", dtype="float32")
    seconds: dict[str, list[float]] = {SUITE: [], ALONE: []}
    processor: dict[str, list[float]] = {SUITE: [], ALONE: []}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds):
        begun = time.process_time()
        taken, texts[SUITE] = run_suite(model, data)
        processor[SUITE].append(time.process_time() - begun)
        seconds[SUITE].append(taken)
        start, begun = time.perf_counter(), time.process_time()
        answers = generate_answers(
            session, questions, data / "pope/val2014", Sampling(max_new_tokens=128), batch_size=1
        )
        by_question = {answer.question: answer.text for answer in answers}
        seconds[ALONE].append(time.perf_counter() - start)
        processor[ALONE].append(time.process_time() - begun)
        texts[ALONE] = [by_question[question] for question in questions]
    return [
        {
            "way": way,
            "questions_per_second": len(questions) / statistics.median(taken),
            "questions_per_processor_second": len(questions) / statistics.median(processor[way]),
            "seconds": taken,
            "processor_seconds": processor[way],
            "same_answers": sum(map(str.__eq__, texts[way], texts[ALONE])) / len(questions),
        }
        for way, taken in seconds.items()
    ]


def run_suite(model: Path, data: Path) -> tuple[float, list[str]]:
    """Return the seconds that answering took in a run of the suite, and the answers."""
    output = data / "suite.json"
    words = ["--suite", "pope", "--model-path", str(model), "--data", str(data), "--json", str(output), "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = suite.main([*words, "--device", "cpu", "--dtype", "float32"])
    if code:
        raise RuntimeError(f"the suite ended with exit code {code}")
    [result] = json.loads(output.read_text(encoding="utf-8"))["results"]
    lines = Path(result["answers"]).read_text(encoding="utf-8").splitlines()
    return result["seconds"], [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
