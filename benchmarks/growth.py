#!/usr/bin/env python3
"""Measure how every step of the job grows with the number of questions: processor time and peak memory, on a CPU.

A table is drawn with 4.25 questions per image on average, in shuffled order, as in VQAv2; every name in the image
folder is a link to one of 64 small images. Each step runs as its user would type it, with the embedded model:
preprocessing, the check of the training data, one step of training (all that happens before it, and saving), batch
inference until its first answer, the same with 90 % of the answers in the journal, and of all questions up to
`--answer-up-to`; scores, and the report. Processor time is that of all processes of a step, so that other programs on
the machine do not matter; peak memory is that of its largest process.

Example: python benchmarks/growth.py --questions 1000 10000 66000 1000000 --output benchmarks/results/growth.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from million_questions import DONE, PER_IMAGE, WORDS, image_name, write_journal
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "playground" / "llava-tiny"
ANSWERS = ("yes", "no", "2", "red", "on the table")
DISTINCT_IMAGES = 64
LORA = ("--lora_r", "16", "--lora_alpha", "32", "--gradient_checkpointing", "False", "--dataloader_num_workers", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every step at every number of questions, and print a table; return the exit code."""
    options = parse_options(argv)
    rows = []
    for count in options.questions:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(Path(folder), count, options):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(as_table(rows, options.questions))
    if options.output:
        report = {"machine": f"CPU, {os.cpu_count()} cores", "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["exit_code"] > 1 for row in rows) else 0  # 1: the check found rows that contradict each other


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=int, nargs="+", default=[1_000, 10_000], help="rows of the table (default: %(default)s)")
    add("--answer-up-to", type=int, default=66_000, help="largest number answered in whole (default: %(default)s)")
    add("--output", type=Path, help="JSON to write")
    return parser.parse_args(argv)


def measure(folder: Path, count: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each step of the job on `count` questions."""
    table, images = folder / "Train_Qs.csv", folder / "images"
    n_images = write_table(table, count)
    write_images(images, n_images)
    data, questions, answers = folder / "data.json", folder / "questions.jsonl", folder / "answers.jsonl"
    prepare = [sys.executable, "task_data_preprocessing.py", "--input", table, "--image_name", "{id}"]
    yield run("preprocessing", count, [*prepare, "--output", data])
    yield run("check of the data", count, [
        sys.executable, "-m", "llava.data.doctor", "--data_path", data, "--image_folder", images,
        "--model_name_or_path", MODEL,
    ])  # fmt: skip
    yield run("one training step", count, [
        "bash", "scripts/v1_5/finetune_task_lora.sh", *LORA, "--max_steps", "1",
    ], BASE_MODEL=MODEL, DATA=folder, OUT=folder / "lora", LAUNCHER="python", ZERO="none", GPUS="1")  # fmt: skip
    run("", count, [*prepare, "--mode", "infer", "--output", questions])
    answer = [
        *("--model-path", MODEL, "--image-folder", images, "--device", "cpu", "--max_new_tokens", "4"),
        *("--question-file", questions, "--answers-file", answers),
    ]
    started = [sys.executable, "benchmarks/million_questions.py", "--child", *answer]
    yield run("first answer", count, started)
    write_journal(questions, answers, round(count * DONE))
    yield run(f"first answer, {DONE:.0%} done", count, started)
    write_journal(questions, answers, 0 if count <= options.answer_up_to else count)
    if count <= options.answer_up_to:
        yield run("all answers", count, [sys.executable, "-m", "llava.eval.model_vqa_loader", *answer])
    else:
        yield run("all answers in the journal", count, started)
    score = [sys.executable, "-m", "llava.eval.vqa_score", "--annotations", table, "--answers-file", answers]
    yield run("scores", count, score)
    yield run("report", count, [
        sys.executable, "-m", "llava.eval.report", "--annotations", table, "--answers", answers,
        "--questions", questions, "--images", images, "--output", folder / "report.html",
    ])  # fmt: skip


def write_table(path: Path, count: int) -> int:
    """Write questions with answers in shuffled order; return the number of images."""
    draw = random.Random(0)
    n_images = max(1, round(count / PER_IMAGE))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question_id", "image", "question", "answer"])
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + "?"
            writer.writerow([number, image_name(draw.randrange(n_images)), text, draw.choice(ANSWERS)])
    return n_images


def write_images(folder: Path, count: int) -> None:
    """Make the image folder: 64 small images under as many names as there are images."""
    folder.mkdir()
    for number in range(count):
        if number < DISTINCT_IMAGES:
            noise = np.random.default_rng(number).normal(128, 64, (48, 64, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / image_name(number), quality=85)
        else:
            (folder / image_name(number)).symlink_to(image_name(number % DISTINCT_IMAGES))


def run(step: str, count: int, command: Sequence[str | Path], **variables: str | Path) -> dict[str, Any]:
    """Run a command from the repository's root; return its processor and wall seconds and peak memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: str(value) for name, value in variables.items()}
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            print(f"{step}: {output.read()[-2_000:].decode(errors='replace')}", file=sys.stderr)
    return {
        "step": step,
        "questions": count,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "exit_code": process.returncode,
    }


def as_table(rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> str:
    """Return the figures in Markdown: a line for each step, a column for each number of questions."""
    lines = [f"| step | {' | '.join(f'{count:,}' for count in counts)} |", f"|{' --- |' * (len(counts) + 1)}"]
    for step in dict.fromkeys(row["step"] for row in rows):
        found = {row["questions"]: row for row in rows if row["step"] == step}
        cells = (
            f"{found[count]['cpu_seconds']:.1f} s, {found[count]['peak_bytes'] / 1e6:,.0f} MB" if count in found else ""
            for count in counts
        )
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
