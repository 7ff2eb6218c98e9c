#!/usr/bin/env python3
"""Compare the accuracy of the small model after training with and without the shared image prefix, over several seeds.

Both kinds of runs are the quickstart's: the same base, table, flags and questions to answer; --seed and
--share_image_prefix are all that differs. Runs that are there already are not repeated.

Example: python benchmarks/share_prefix_accuracy.py --work /tmp/share --output share_prefix_accuracy.json
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.eval import model_vqa_loader
from llava.train import train

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "shapes_world")]

import make_world  # noqa: E402 (programs, found by the path above)

import task_data_preprocessing  # noqa: E402

BASE = ROOT / "playground" / "llava-tiny"
FLAGS = ["--version", "v1", "--image_aspect_ratio", "pad", "--num_train_epochs", "1", "--model_max_length", "2048"]
FLAGS += ["--lora_enable", "True", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"]
FLAGS += ["--learning_rate", "1e-3", "--mm_projector_lr", "2e-4", "--per_device_train_batch_size", "16"]
FLAGS += ["--weight_decay", "0.", "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "20"]
FLAGS += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
LIBRARIES = ("torch", "transformers", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, answer and score every run; print the table; return the exit code."""
    options = build_parser().parse_args(argv)
    world = options.work / "world"
    write_world(world, options)
    rows = []
    for seed in range(options.seeds):
        for share in (True, False):
            row = measure(world, share, seed, options)
            rows.append(row)
            print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{name}; " + ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
    print(f"{machine}\n\n{as_table(rows)}")
    if options.output:
        report = {"machine": machine, "scenes": options.scenes, "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="directory for world, runs and answers")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=4200, help="images to train on (default: %(default)s)")
    parser.add_argument("--infer-scenes", type=int, default=200, help="images asked about (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=-1, help="end training early (default: one epoch)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def write_world(world: Path, options: argparse.Namespace) -> None:
    """Draw the images and prepare both tables."""
    words = ["--output", str(world), "--train_scenes", str(options.scenes), "--infer_scenes", str(options.infer_scenes)]
    make_world.main(words)
    data = world / "data_train"
    task_data_preprocessing.main(["--input", str(data / "Train_Qs.csv"), "--output", str(data / "data.json")])
    data = world / "data_infer"
    words = ["--mode", "infer", "--input", str(data / "Test_Qs.csv"), "--output", str(data / "questions.jsonl")]
    task_data_preprocessing.main(words)


def measure(world: Path, share: bool, seed: int, options: argparse.Namespace) -> dict:
    """Return the seconds and scores of one run."""
    run = options.work / f"{'shared' if share else 'apart'}_{seed}"
    answers = run / "answers.jsonl"
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        if not (run / "adapter_model.safetensors").exists():
            words = ["--model_name_or_path", str(BASE), "--data_path", str(world / "data_train" / "data.json")]
            words += ["--image_folder", str(world / "data_train" / "images"), "--output_dir", str(run)]
            words += ["--seed", str(seed), "--share_image_prefix", str(share), "--max_steps", str(options.max_steps)]
            check(train.main([*FLAGS, *words, "--dataloader_num_workers", str(options.workers)]), "training")
        trained = time.perf_counter()
        words = ["--model-path", str(run), "--model-base", str(BASE), "--answers-file", str(answers)]
        words += ["--question-file", str(world / "data_infer" / "questions.jsonl")]
        words += ["--image-folder", str(world / "data_infer" / "images")]
        check(model_vqa_loader.main(words), "answering")
    return {
        "shared": share,
        "seed": seed,
        "training_s": round(trained - started, 1),
        "answering_s": round(time.perf_counter() - trained, 1),
        **scores(answers, world / "data_infer" / "Test_Qs.csv"),
    }


def scores(answers: Path, table: Path) -> dict[str, float]:
    """Return the share of right answers in percent, of all questions and by kind."""
    with table.open(encoding="utf-8", newline="") as stream:
        asked = {int(row["question_id"]): row for row in csv.DictReader(stream)}
    given = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    right: dict[str, list[bool]] = {"all": []}
    for answer in given:
        row = asked[int(answer["question_id"])]
        is_right = answer["text"].strip() == row["answer"]
        right["all"].append(is_right)
        right.setdefault(row["kind"], []).append(is_right)
    return {kind: round(100 * sum(values) / len(values), 2) for kind, values in right.items()}


def check(code: int, what: str) -> None:
    """Raise RuntimeError if a program failed."""
    if code:
        raise RuntimeError(f"{what} ended with exit code {code}")


def as_table(rows: Sequence[dict]) -> str:
    """Return mean and standard deviation by kind, shared and apart, and the difference with its standard error."""
    kinds = [key for key in rows[0] if key not in ("shared", "seed", "training_s", "answering_s")]
    lines = ["| % right | shared | apart | difference |", "| --- | --- | --- | --- |"]
    for kind in ["training_s", *kinds]:
        groups = [[row[kind] for row in rows if row["shared"] is share] for share in (True, False)]
        means = [statistics.mean(group) for group in groups]
        spreads = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups]
        error = math.sqrt(sum(spread**2 / len(group) for spread, group in zip(spreads, groups, strict=True)))
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True)]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} | {means[0] - means[1]:+.1f} ± {error:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
