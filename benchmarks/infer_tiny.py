#!/usr/bin/env python3
"""Measure batch answering by a small model on the CPU: questions a second, ours against transformers' `generate`.

The model and its test questions are those of the quickstart: one question of every kind about each drawn image. Each
way answers all of them from files on disk; ways take turns, and the median of the rounds counts. Answers are compared.
Where other programs run beside, a second of processor time says more than one of the clock.

Example: python benchmarks/infer_tiny.py --output benchmarks/results/infer_tiny.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from llava.files.overwrite_check import find_overwrite, output_file
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import Answer
from llava.inference.batch.generate_fallback import generate_answers
from llava.inference.batch.questions import Question, read_questions
from llava.inference.session import Sampling, Session

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "shapes_world")]

import make_world  # noqa: E402 (programs, found by the path above)

import task_data_preprocessing  # noqa: E402

GENERATE_BATCH = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    session = Session.load(str(options.model), device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(Path(folder), options.scenes)
        report = {
            "machine": describe_machine(),
            "model": options.model.name,
            "questions": len(questions),
            "images": len({question.images for question in questions}),
            "rounds": options.rounds,
            "rows": measure(session, questions, Path(folder) / "data_infer" / "images", options.rounds),
        }
    print(f"{report['machine']}\n{len(questions)} questions about {report['images']} images\n")
    print("| way | questions/s | of processor time | same answers |\n| --- | --- | --- | --- |")
    for row in report["rows"]:
        rates = f"{row['questions_per_second']:.1f} | {row['questions_per_processor_second']:.1f}"
        print(f"| {row['way']} | {rates} | {row['same_answers']:.2%} |")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "playground/llava-tiny", help="directory (default: %(default)s)")
    add("--scenes", type=int, default=200, help="images (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of every way (default: %(default)s)")
    add("--threads", type=int, help="of PyTorch (default: what it chooses)")
    add("--output", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    inputs = {"--model": options.model}
    if options.output and (message := find_overwrite({"--output": output_file(options.output)}, inputs)):
        parser.error(message)
    return options


def make_questions(folder: Path, scenes: int) -> list[Question]:
    """Draw images, write their questions as the quickstart does, and read them."""
    words = ["--output", str(folder), "--train_scenes", "1", "--infer_scenes", str(scenes)]
    data = folder / "data_infer"
    with contextlib.redirect_stdout(io.StringIO()):
        make_world.main(words)
        task_data_preprocessing.main(
            ["--mode", "infer", "--input", str(data / "Test_Qs.csv"), "--output", str(data / "questions.jsonl")]
        )
    return read_questions(data / "questions.jsonl")


def measure(session: Session, questions: Sequence[Question], images: Path, rounds: int) -> list[dict[str, Any]]:
    """Return for each way its questions a second, and the share of its answers that equal `generate` one at a time."""
    sampling = Sampling(max_new_tokens=16)

    def in_batches(size: int) -> Iterable[Answer]:
        return generate_answers(session, questions, images, sampling, batch_size=size)

    ways: dict[str, Callable[[], Iterable[Answer]]] = {
        "ours": lambda: answer_batch(session, questions, images, sampling),
        "`generate`, one at a time": lambda: in_batches(1),
        f"`generate`, batches of {GENERATE_BATCH}": lambda: in_batches(GENERATE_BATCH),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, dict[int | str, str]] = {}
    for _ in range(rounds):
        for way, answer in ways.items():
            start, begun = time.perf_counter(), time.process_time()
            answers = list(answer())
            seconds[way].append(time.perf_counter() - start)
            processor[way].append(time.process_time() - begun)
            texts[way] = {row.question.question_id: row.text for row in answers if row.error is None}
    alone = texts["`generate`, one at a time"]
    return [
        {
            "way": way,
            "questions_per_second": len(questions) / statistics.median(taken),
            "questions_per_processor_second": len(questions) / statistics.median(processor[way]),
            "seconds": taken,
            "processor_seconds": processor[way],
            "same_answers": sum(texts[way].get(key) == text for key, text in alone.items()) / len(questions),
        }
        for way, taken in seconds.items()
    ]


def describe_machine() -> str:
    """Return processor, cores, threads and versions in a line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in ("torch", "transformers"))
    return f"{processor_name()}, {cores} cores, {torch.get_num_threads()} threads, {versions}"


def processor_name() -> str:
    """Return what the processor is called."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    sys.exit(main())
