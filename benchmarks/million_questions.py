#!/usr/bin/env python3
"""Measure the start of a batch run of very many questions: processor time and peak memory until the first answer.

A question file is drawn, with 4.25 questions per image on average and in shuffled order, as in VQAv2. The program is
started on it four times, each time in a process of its own: with one question (what importing and loading the model
take), up to the first answer of a new run, up to the first answer of a run that has 90 % of its answers, and with all
answers in the journal, until the answers file is written. Processor time is measured, so that other programs on the
machine do not matter.

Example: python benchmarks/million_questions.py --questions 1000000 --output benchmarks/results/million_questions.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from llava.files.overwrite_check import find_overwrite, output_file

ROOT = Path(__file__).resolve().parents[1]
PER_IMAGE = 4.25
DONE = 0.9
WORDS = (
    *(
        "is",
        "are",
        "there",
        "the",
        "what",
        "which",
        "color",
        "how",
        "many",
        "person",
        "dog",
        "cat",
        "left",
        "of",
        "red",
    ),
    *("car", "sitting", "table", "behind", "in", "on"),
)
MODEL_ID = "llava-tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_options(argv)
    if options.child:
        run_until_answer(options.child)
        return 0
    with tempfile.TemporaryDirectory() as name:
        report = {"questions": options.questions, **measure(Path(name), options)}
    print("| run | CPU seconds | until it says something | peak memory, MB | bytes a question |")
    print("| --- | --- | --- | --- | --- |")
    alone = report["rows"][0]["peak_bytes"]
    for row in report["rows"]:
        each = (row["peak_bytes"] - alone) / options.questions
        print(
            f"| {row['run']} | {row['cpu_seconds']:.1f} | {row['first_line']:.1f} | {row['peak_bytes'] / 1e6:,.0f} "
            f"| {each:,.0f} |"
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=int, default=1_000_000, help="lines of the file (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--model", type=Path, default=ROOT / "playground/llava-tiny", help="directory (default: %(default)s)")
    add("--output", type=Path, help="JSON to write")
    add("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    inputs = {"--model": options.model}
    if options.output and (message := find_overwrite({"--output": output_file(options.output)}, inputs)):
        parser.error(message)
    return options


def write_questions(path: Path, count: int, seed: int) -> int:
    """Write a question file in shuffled order; return the number of images."""
    draw = random.Random(seed)
    n_images = max(1, round(count / PER_IMAGE))
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + "?"
            row = {"question_id": number, "image": image_name(draw.randrange(n_images)), "text": text}
            stream.write(json.dumps(row) + "\n")
    return n_images


def image_name(number: int) -> str:
    """Return the file name of an image, in COCO's form."""
    return f"COCO_val2014_{number:012d}.jpg"


def write_images(folder: Path, count: int) -> None:
    """Make the image folder: one small file under as many names."""
    folder.mkdir()
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "image.jpg")
    for number in range(count):
        (folder / image_name(number)).symlink_to("image.jpg")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of figures for each run."""
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    n_images = write_questions(questions, options.questions, options.seed)
    write_images(folder / "images", n_images)
    arguments = ["--model-path", str(options.model), "--image-folder", str(folder / "images"), "--device", "cpu"]
    arguments += ["--question-file", str(questions), "--max_new_tokens", "1"]
    one = folder / "one.jsonl"
    write_questions(one, 1, options.seed)
    rows = [
        start("one question", [*arguments, "--question-file", str(one), "--answers-file", str(folder / "alone.jsonl")]),
        start("first answer", [*arguments, "--answers-file", str(answers)]),
    ]
    for share, name in ((DONE, f"first answer, {DONE:.0%} done"), (1.0, "all done, file written")):
        write_journal(questions, answers, round(options.questions * share))
        rows.append(start(name, [*arguments, "--answers-file", str(answers)]))
    return {"images": n_images, "rows": rows}


def write_journal(questions: Path, answers: Path, count: int) -> None:
    """Write the answers to the first questions into the journal, beside the settings of a run."""
    from llava.inference.batch.answers_file import JOURNAL_SUFFIX, Answer
    from llava.inference.batch.questions import Question

    with (
        questions.open(encoding="utf-8") as lines,
        answers.with_name(answers.name + JOURNAL_SUFFIX).open("w", encoding="utf-8") as stream,
    ):
        for line, _ in zip(lines, range(count), strict=False):
            row = json.loads(line)
            answer = Answer(Question(row["question_id"], row["text"], (row["image"],)), "yes")
            stream.write(json.dumps(answer.to_record(MODEL_ID)) + "\n")


def start(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the program in a process of its own until it has answered once; return its figures."""
    command = [sys.executable, __file__, "--child", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(process.stdout.splitlines()[-1])
    print(f"{name}: {figures}", file=sys.stderr)
    return {"run": name, "seconds": time.perf_counter() - begun, **figures}


def run_until_answer(arguments: Sequence[str]) -> None:
    """Run the program until it writes its first answer, and print the figures of this process."""
    import resource

    from llava.eval import model_vqa_loader
    from llava.inference.batch.answers_file import AnswersFile

    found: dict[str, float] = {}

    def note(self: AnswersFile, *_: Any) -> None:
        found["cpu_seconds"] = time.process_time()
        raise KeyboardInterrupt

    AnswersFile.write = note
    sys.stderr = watched = Watched(sys.stderr)
    model_vqa_loader.main(arguments)
    found.setdefault("cpu_seconds", time.process_time())
    found["first_line"] = watched.first or found["cpu_seconds"]
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps(found))


class Watched:
    """A text stream that records the processor time of the first line about questions."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.first = stream, 0.0

    def write(self, text: str) -> int:
        """Write to the stream."""
        if not self.first and "question" in text:
            self.first = time.process_time()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


if __name__ == "__main__":
    sys.exit(main())
