"""Write the shapes world as training and inference data: tables of questions and folders of images.

OUTPUT/data_train and OUTPUT/data_infer have the layout of playground/data_train and playground/data_infer. No scene is
in both, and none was in the base's training.

Example: python examples/shapes_world/make_world.py --output quickstart
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from questions import NEW_KINDS, OLD_KINDS, Question, ask
from scenes import Scene, sample_scene

from llava.files.atomic_files import atomic_directory
from llava.files.json_files import parse_json

SETTINGS_FILE = "world.json"
COLUMNS = ("", "image_id", "question", "question_id", "answer", "kind")
TASK_SHARES = {"count": 6.0, "relation": 4.5, "compare": 4.5}  # in the training table
# Tables of real users hold what the base knows, too. Without such rows it forgets, above all the "which is" questions
# whose wording is closest to the new ones.
OLD_SHARES = {kind: 7.0 if kind == "which" else 0.3 for kind in OLD_KINDS}
FIRST_TRAIN_IMAGE, FIRST_INFER_IMAGE = 1_000, 500_000
ATTEMPTS = 4  # per question: some wordings don't suit some scenes


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        image_id: number in the image's file name.
        number: of the question among those about this image, from 0.
        question: text, answer and kind.
    """

    image_id: int
    number: int
    question: Question

    @property
    def question_id(self) -> int:
        """Unique in all tables."""
        return self.image_id * 1000 + self.number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="directory for data_train and data_infer"
    )
    parser.add_argument("--train_scenes", type=int, default=4_200, help="training images, three questions each")
    parser.add_argument("--infer_scenes", type=int, default=200, help="test images, one question of every kind each")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another world")
    arguments = parser.parse_args(argv)
    for name in ("train_scenes", "infer_scenes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: at least one scene is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Write both folders; returns the exit code."""
    arguments = parse_arguments(argv)
    parts = (
        ("data_train", "Train_Qs.csv", arguments.train_scenes, FIRST_TRAIN_IMAGE),
        ("data_infer", "Test_Qs.csv", arguments.infer_scenes, FIRST_INFER_IMAGE),
    )
    for name, table, scenes, first_image in parts:
        folder = arguments.output / name
        settings = {"table": table, "scenes": scenes, "seed": arguments.seed, "first_image": first_image}
        if has_settings(folder, settings):
            print(f"{folder} exists already")
        elif folder.exists() and not (folder / SETTINGS_FILE).is_file():
            print(f"{folder} holds something else; give another --output", file=sys.stderr)
            return 1
        else:
            write_folder(folder, settings)
    return 0


def has_settings(folder: Path, settings: dict[str, str | int]) -> bool:
    """Whether the folder was written with exactly these settings."""
    file = folder / SETTINGS_FILE
    return file.is_file() and parse_json(file.read_text(encoding="utf-8")) == settings


def write_folder(folder: Path, settings: dict[str, str | int]) -> None:
    """Write table and images, all of them or none; what an earlier run wrote there is replaced."""
    from drawing import draw_scene, encode_jpeg  # imports NumPy and Pillow: flags are parsed first

    ask_about = ask_task if settings["table"] == "Train_Qs.csv" else ask_everything
    # A string seeds `random` the same everywhere; the base's scenes have seeds of another form.
    rng = random.Random(f"world {settings['seed']} {settings['table']}")
    rows: list[Row] = []
    tally: Counter[tuple[str, str]] = Counter()
    with atomic_directory(folder, replace=True) as directory:
        (directory / "images").mkdir()
        for image_id in range(settings["first_image"], settings["first_image"] + settings["scenes"]):
            scene = sample_scene(rng)
            image = encode_jpeg(draw_scene(scene), scene.jpeg_quality)
            (directory / "images" / f"COCO_val2014_{image_id:012d}.jpg").write_bytes(image)
            rows += [Row(image_id, number, q) for number, q in enumerate(ask_about(scene, rng, tally))]
        write_table(rows, directory / settings["table"])
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {folder}: {len(rows)} questions about {settings['scenes']} images")


def ask_task(scene: Scene, rng: random.Random, tally: Counter[tuple[str, str]]) -> Iterator[Question]:
    """Three different questions, mostly of new kinds."""
    shares = {**TASK_SHARES, **OLD_SHARES}
    texts: set[str] = set()
    for _ in range(3 * ATTEMPTS):
        (kind,) = rng.choices(list(shares), weights=shares.values())
        question = ask(kind, scene, rng, tally)
        if question is not None and question.text not in texts:
            texts.add(question.text)
            yield question
        if len(texts) == 3:
            return


def ask_everything(scene: Scene, rng: random.Random, tally: Counter[tuple[str, str]]) -> Iterator[Question]:
    """One question of every kind that the scene allows."""
    for kind in OLD_KINDS + NEW_KINDS:
        questions = (ask(kind, scene, rng, tally) for _ in range(ATTEMPTS))
        found = next((question for question in questions if question is not None), None)
        if found is not None:
            yield found


def write_table(rows: Sequence[Row], file: Path) -> None:
    """Write the rows in the layout of VQAv2's task tables, with the kind of question as a further column."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for index, row in enumerate(rows):
            question = row.question
            writer.writerow((index, row.image_id, question.text, row.question_id, question.answer, question.kind))


if __name__ == "__main__":
    raise SystemExit(main())
