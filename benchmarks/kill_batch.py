"""Kill a batch run again and again, run it again each time, and compare the file with that of a run left alone.

The process is killed (SIGKILL) in the middle of writing an answer, after a number of answers that follows from --seed,
every other time with another batch size. The exit code is 1 if the file differs, or an answer was computed twice.

    python benchmarks/kill_batch.py --kills 25
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
KILLED = """
import os, signal, sys
from llava.eval.model_vqa_loader import main
left, write = [int(sys.argv[1])], os.write
def write_and_die(descriptor, data):
    if bytes(data[:1]) == b"{":
        left[0] -= 1
        if not left[0]:
            write(descriptor, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, data)
os.write = write_and_die
sys.exit(main(sys.argv[2:]))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--most-answers", type=int, default=30, help="between two kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other places to kill (default: %(default)s)")
    options = parser.parse_args(argv)
    chance = random.Random(options.seed)
    alive = [chance.randint(1, options.most_answers) for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as folder:
        return kill(Path(folder), alive)


def kill(folder: Path, alive: Sequence[int]) -> int:
    """Kill each run after its number of answers and compare the file; return the exit code."""
    count = sum(alive) + 10
    command = write_inputs(folder, count)
    answers, journal = folder / "answers.jsonl", folder / "answers.jsonl.journal"
    run([*command, "--answers-file", str(folder / "whole.jsonl")], 10 * count)
    kept = 0
    for number, until in enumerate(alive):
        code = run([*command, "--answers-file", str(answers), "--batch-size", str(1 + number % 2 * 7)], until)
        before, kept = kept, journal.read_bytes().count(b"\n") if journal.exists() else 0
        if code != -9 or kept != before + until - 1:
            print(f"kill {number}: exit code {code}, {kept} answers after {before} and {until - 1} more")
            return 1
    code = run([*command, "--answers-file", str(answers)], 10 * count)
    is_same = answers.read_bytes() == (folder / "whole.jsonl").read_bytes()
    print(f"{len(alive)} kills in the middle of a line, {count} questions: exit code {code}, the file is", end=" ")
    print("that of a run left alone" if is_same else "another one")
    return 0 if is_same and code == 0 else 1


def write_inputs(folder: Path, count: int) -> list[str]:
    """Write images and questions, and return the flags of a run about them."""
    for number in range(7):
        Image.new("RGB", (60, 40), (number * 30, 200, 90)).save(folder / f"{number}.png")
    rows = [{"question_id": key, "image": f"{key % 7}.png", "text": f"What is {key}?"} for key in range(count)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model-path", str(REPOSITORY / "playground/llava-tiny"), "--image-folder", str(folder)]
    return [*model, "--question-file", str(folder / "questions.jsonl"), "--device", "cpu", "--max_new_tokens", "4"]


def run(arguments: Sequence[str], until: int) -> int:
    """Run the program, killed at its answer number `until`; return the exit code."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED, str(until), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
