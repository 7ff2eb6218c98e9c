"""Benchmarks of a few questions with drawn images, in the original's folders."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.eval import suite

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "playground/llava-tiny"
SHORT = "\nAnswer the question using a single word or phrase."
SPLITS = ("random", "popular", "adversarial")
THINGS = ("square", "circle", "triangle")


class Data:
    """Folder of benchmarks, and the suite's program on it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def write_lines(self, name: str, records: Sequence[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def draw(self, folder: str, names: Sequence[str]) -> None:
        place = self.folder / folder
        place.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            Image.new("RGB", (64, 48), (40 * number % 256, 90, 200)).save(place / name)

    def lay_out_pope(self, images: int = 3) -> None:
        names = [f"COCO_val2014_{number:012d}.jpg" for number in range(images)]
        self.draw("pope/val2014", names)
        questions, number = [], 0
        for split in SPLITS:
            labels = []
            for image in names:
                for thing in THINGS:
                    number += 1
                    text = f"Is there a {thing} in the image?"
                    record = {"question_id": number, "image": image, "text": text + SHORT, "category": split}
                    questions.append(record)
                    labels.append(
                        {"question_id": number, "image": image, "text": text, "label": ("yes", "no")[number % 2]}
                    )
            self.write_lines(f"pope/coco/coco_pope_{split}.json", labels)
        self.write_lines("pope/llava_pope_test.jsonl", questions)

    def lay_out_vizwiz(self, images: int = 2) -> None:
        names = [f"VizWiz_test_{number:08d}.jpg" for number in range(images)]
        self.draw("vizwiz/test", names)
        lines = [{"question_id": key, "image": name, "text": f"What is this?{SHORT}"} for key, name in enumerate(names)]
        self.write_lines("vizwiz/llava_test.jsonl", lines)

    def lay_out_scienceqa(self) -> None:
        self.draw("scienceqa/images/test/1", ["image.png"])
        records = [
            {"id": "1", "image": "1/image.png", "conversations": turns("<image>\nWhich is it?\nA. red\nB. blue", "A")},
            {"id": "2", "conversations": turns("Which rhymes?\nA. so\nB. go", "B")},
        ]
        (self.folder / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(records), encoding="utf-8")

    def lay_out_textvqa(self) -> None:
        """Two questions about one image, whose id both have."""
        self.draw("textvqa/train_images", ["a.jpg"])
        texts = ("what is written?", "which color is it?")
        lines = [
            {"question_id": "a", "image": "a.jpg", "text": f"{text}\nReference OCR token: X{SHORT}"} for text in texts
        ]
        self.write_lines("textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)
        truths = [{"image_id": "a", "question": text, "answers": ["red"] * 10} for text in texts]
        (self.folder / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": truths}), encoding="utf-8")

    def lay_out_mme(self) -> None:
        """Two tasks of one image each; each image has a question whose answer is yes and one whose answer is no."""
        questions = []
        for task in ("color", "artwork"):
            self.draw(f"MME/MME_Benchmark_release_version/{task}", ["1.png"])
            truths = [("Is it red?", "Yes"), ("Is it blue?", "No")]
            (self.folder / f"MME/MME_Benchmark_release_version/{task}/1.txt").write_text(
                "".join(f"{text} Please answer yes or no.\t{answer}\n" for text, answer in truths), encoding="utf-8"
            )
            name = f"{task}/1.png"
            questions += [{"question_id": name, "image": name, "text": f"{text}{SHORT}"} for text, _ in truths]
        self.write_lines("MME/llava_mme.jsonl", questions)

    def lay_out_mmbench(self, language: str = "en") -> None:
        """Two questions about one image, the first in two rotations; the second row names the first's image."""
        name = {"en": "mmbench/mmbench_dev_20230712.tsv", "cn": "mmbench_cn/mmbench_dev_cn_20231003.tsv"}[language]
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), (200, 30, 30)).save(buffer, "PNG")
        image = base64.b64encode(buffer.getvalue()).decode()
        rows = [
            ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
            ("1", "Which color is it?", "", "red", "blue", "", "", "A", "color", image),
            ("1000001", "Which color is it?", "", "blue", "red", "", "", "B", "color", image),
            ("2", "What is it?", "Look.", "a dog", "a wall", "a cat", "", "B", "thing", image),
        ]
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")

    def words(self, names: str, *more: object, model: Path | str | None = None) -> list[str]:
        start = ("--suite", names, "--model-path", model or self.model, "--data", self.folder, "--device", "cpu")
        return [str(word) for word in (*start, *more)]

    def __call__(self, names: str, *more: object, model: Path | str | None = None) -> int:
        return suite.main(self.words(names, *more, model=model))

    def answers(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Return an empty folder of benchmarks, and the suite on the embedded model."""
    torch.set_num_threads(1)
    return Data(tmp_path / "eval", TINY)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the checkpoints that the suite loads, in order."""
    from llava.eval.benchmark_suite import run

    load, loaded = run.load_session, []

    def load_and_count(args: Any, **options: Any) -> Any:
        loaded.append(Path(args.model_path).name)
        return load(args, **options)

    monkeypatch.setattr(run, "load_session", load_and_count)
    return loaded


@pytest.fixture
def originals(shared_path: Callable[[str], Path], tmp_path: Path) -> Data:
    """Return a folder of benchmarks with the original's question files and answers, without images."""
    found = Data(tmp_path / "eval", Path("llava-v1.5-13b"))
    for source in shared_path("eval").rglob("*.json*"):
        target = found.folder / source.relative_to(shared_path("eval"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return found
