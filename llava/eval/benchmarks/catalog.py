"""The twelve benchmarks of LLaVA-1.5: files, where they come from, sizes, and published figures.

Folders and names are those of the original's `playground/data/eval`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

DATA = Path("playground/data/eval")
"""Folder of all benchmarks, relative to where the scripts run."""

EVAL_ZIP = "eval.zip: https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view"
"""The original's archive of question files and answers; it is unpacked into `DATA`."""

_LETTER = "the options A, B, … and: answer with the option's letter"
_WORD = "the question and: answer with a word or a phrase"
_FREE = "the question alone"


class QuestionFormat(Enum):
    """Format of a question file."""

    LINES = "JSON lines {question_id, image, text}"
    SCIENCE = "ScienceQA's records {id, image, conversations}"
    MMBENCH = "MMBench's table, which holds the images"


@dataclass(frozen=True)
class Published:
    """Figure of LLaVA-1.5 in its paper; `unit` is "%" or "points"."""

    name: str
    small: float
    large: float
    unit: str = "%"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line, and of its script.
        title: in tables.
        folder: below the data folder; the other paths are relative to it.
        question_file: with prompts.
        images: folder of the images; None if the question file holds them.
        annotations: files or folders with the true answers, and whatever else scoring reads.
        origins: for each of these paths where it comes from.
        answers: path of the answers file; `{model}` is the model's name.
        upload: path of what an evaluation server or another program takes; None if there is no such file.
        server: address of who scores `upload`, or the program that does; "" if it is scored here.
        prompt: what the question file asks for, in words.
        published: figures of LLaVA-1.5 7B and 13B.
        questions: in the question file.
        distinct_images: images they are about; None if that is not known.
        question_format: of the question file.
        max_new_tokens: longest answer.
        language: of the instruction in MMBench's prompts.
    """

    name: str
    title: str
    folder: str
    question_file: str
    images: str | None
    origins: dict[str, str]
    answers: str
    prompt: str
    published: Published
    questions: int
    distinct_images: int | None
    annotations: tuple[str, ...] = ()
    upload: str | None = None
    server: str = ""
    question_format: QuestionFormat = QuestionFormat.LINES
    max_new_tokens: int = 128
    language: str = "en"

    def answers_path(self, data: Path, model: str) -> Path:
        """Return the path of a model's answers."""
        return data / self.folder / self.answers.format(model=model)

    def upload_path(self, data: Path, model: str) -> Path | None:
        """Return the path of a model's submission file; None if the benchmark has none."""
        return None if self.upload is None else data / self.folder / self.upload.format(model=model)


_VQAV2 = "llava_vqav2_mscoco_test-dev2015"
_GQA = "llava_gqa_testdev_balanced"
_MMBENCH = "mmbench_dev_20230712"
_MMBENCH_CN = "mmbench_dev_cn_20231003"
_TSV = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
_OPENCOMPASS = "https://opencompass.org.cn/leaderboard-multimodal"

BENCHMARKS = (
    Benchmark(
        name="vqav2",
        title="VQAv2",
        folder="vqav2",
        question_file=f"{_VQAV2}.jsonl",
        images="test2015",
        annotations=("llava_vqav2_mscoco_test2015.jsonl",),
        origins={
            f"{_VQAV2}.jsonl": EVAL_ZIP,
            "test2015": "http://images.cocodataset.org/zips/test2015.zip",
            "llava_vqav2_mscoco_test2015.jsonl": EVAL_ZIP,
        },
        answers=f"answers/{_VQAV2}/{{model}}/merge.jsonl",
        upload=f"answers_upload/{_VQAV2}/{{model}}.json",
        server="https://eval.ai/web/challenges/challenge-page/830/my-submission",
        prompt=_WORD,
        published=Published("accuracy", 78.5, 80.0),
        questions=107_394,
        distinct_images=36_807,
    ),
    Benchmark(
        name="gqa",
        title="GQA",
        folder="gqa",
        question_file=f"{_GQA}.jsonl",
        images="data/images",
        annotations=("data/testdev_balanced_questions.json",),
        origins={
            f"{_GQA}.jsonl": EVAL_ZIP,
            "data/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
            "data/testdev_balanced_questions.json":
                "questions1.2.zip: https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
        },
        answers=f"answers/{_GQA}/{{model}}/merge.jsonl",
        upload=f"answers/{_GQA}/{{model}}/testdev_balanced_predictions.json",
        prompt=_WORD,
        published=Published("accuracy", 62.0, 63.3),
        questions=12_578,
        distinct_images=398,
    ),
    Benchmark(
        name="vizwiz",
        title="VizWiz",
        folder="vizwiz",
        question_file="llava_test.jsonl",
        images="test",
        origins={
            "llava_test.jsonl": EVAL_ZIP,
            "test": "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip",
        },
        answers="answers/{model}.jsonl",
        upload="answers_upload/{model}.json",
        server="https://eval.ai/web/challenges/challenge-page/2185/my-submission",
        prompt=f"{_WORD}, or with Unanswerable",
        published=Published("accuracy", 50.0, 53.6),
        questions=8_000,
        distinct_images=8_000,
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        folder="scienceqa",
        question_file="llava_test_CQM-A.json",
        images="images/test",
        origins={
            "llava_test_CQM-A.json": EVAL_ZIP,
            "images/test": "data/scienceqa of https://github.com/lupantech/ScienceQA",
        },
        answers="answers/{model}.jsonl",
        prompt=f"context, question, {_LETTER}",
        published=Published("with image", 66.8, 71.6),
        questions=4_241,
        distinct_images=2_017,
        question_format=QuestionFormat.SCIENCE,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="textvqa",
        title="TextVQA",
        folder="textvqa",
        question_file="llava_textvqa_val_v051_ocr.jsonl",
        images="train_images",
        annotations=("TextVQA_0.5.1_val.json",),
        origins={
            "llava_textvqa_val_v051_ocr.jsonl": EVAL_ZIP,
            "train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            "TextVQA_0.5.1_val.json": "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
        },
        answers="answers/{model}.jsonl",
        prompt="the question, the words that OCR found, and: answer with a word or a phrase",
        published=Published("accuracy", 58.2, 61.3),
        questions=5_000,
        distinct_images=3_166,
    ),
    Benchmark(
        name="pope",
        title="POPE",
        folder="pope",
        question_file="llava_pope_test.jsonl",
        images="val2014",
        annotations=("coco",),
        origins={
            "llava_pope_test.jsonl": EVAL_ZIP,
            "val2014": "http://images.cocodataset.org/zips/val2014.zip",
            "coco": "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco",
        },
        answers="answers/{model}.jsonl",
        prompt=_WORD,
        published=Published("mean F1", 85.9, 85.9),
        questions=8_910,
        distinct_images=500,
    ),
    Benchmark(
        name="mme",
        title="MME",
        folder="MME",
        question_file="llava_mme.jsonl",
        images="MME_Benchmark_release_version",
        origins={
            "llava_mme.jsonl": EVAL_ZIP,
            "MME_Benchmark_release_version":
                "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        },
        answers="answers/{model}.jsonl",
        upload="eval_tool/answers/{model}",
        prompt=_WORD,
        published=Published("perception", 1510.7, 1531.3, "points"),
        questions=2_374,
        distinct_images=1_187,
    ),
    Benchmark(
        name="mmbench",
        title="MMBench",
        folder="mmbench",
        question_file=f"{_MMBENCH}.tsv",
        images=None,
        origins={f"{_MMBENCH}.tsv": f"{_TSV}{_MMBENCH}.tsv"},
        answers=f"answers/{_MMBENCH}/{{model}}.jsonl",
        upload=f"answers_upload/{_MMBENCH}/{{model}}.xlsx",
        server=_OPENCOMPASS,
        prompt=f"hint, question, {_LETTER}",
        published=Published("accuracy", 64.3, 67.7),
        questions=4_377,
        distinct_images=1_164,
        question_format=QuestionFormat.MMBENCH,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mmbench_cn",
        title="MMBench-CN",
        folder="mmbench_cn",
        question_file=f"{_MMBENCH_CN}.tsv",
        images=None,
        origins={f"{_MMBENCH_CN}.tsv": f"{_TSV}{_MMBENCH_CN}.tsv"},
        answers=f"answers/{_MMBENCH_CN}/{{model}}.jsonl",
        upload=f"../mmbench/answers_upload/{_MMBENCH_CN}/{{model}}.xlsx",
        server=_OPENCOMPASS,
        prompt=f"hint, question, {_LETTER}, in Chinese",
        published=Published("accuracy", 58.3, 63.6),
        questions=4_329,
        distinct_images=1_164,
        question_format=QuestionFormat.MMBENCH,
        max_new_tokens=1024,
        language="cn",
    ),
    Benchmark(
        name="seed",
        title="SEED-Bench",
        folder="seed_bench",
        question_file="llava-seed-bench.jsonl",
        images=".",
        annotations=("SEED-Bench.json",),
        origins={
            "llava-seed-bench.jsonl": EVAL_ZIP,
            ".": "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md: the images into SEED-Bench-image, the "
                "middle frame of each video into SEED-Bench-video-image",
            "SEED-Bench.json": "https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        },
        answers="answers/{model}/merge.jsonl",
        upload="answers_upload/{model}.jsonl",
        prompt=f"the question, {_LETTER}",
        published=Published("accuracy", 58.6, 61.6),
        questions=17_990,
        distinct_images=None,
    ),
    Benchmark(
        name="llavabench",
        title="LLaVA-Bench",
        folder="llava-bench-in-the-wild",
        question_file="questions.jsonl",
        images="images",
        origins={
            "questions.jsonl": "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
            "images": "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
        },
        answers="answers/{model}.jsonl",
        server="python -m llava.eval.eval_gpt_review_bench",
        prompt=_FREE,
        published=Published("relative score", 65.4, 72.5),
        questions=60,
        distinct_images=24,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        folder="mm-vet",
        question_file="llava-mm-vet.jsonl",
        images="images",
        origins={
            "llava-mm-vet.jsonl": EVAL_ZIP,
            "images": "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
        },
        answers="answers/{model}.jsonl",
        upload="results/{model}.json",
        server="https://huggingface.co/spaces/whyu/MM-Vet_Evaluator",
        prompt=_FREE,
        published=Published("score", 31.1, 36.1),
        questions=218,
        distinct_images=200,
        max_new_tokens=1024,
    ),
)  # fmt: skip

NAMES = tuple(benchmark.name for benchmark in BENCHMARKS)


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name; `sqa` is the original's name of `scienceqa`.

    Raises:
        ValueError: if there is none of this name.
    """
    found = {benchmark.name: benchmark for benchmark in BENCHMARKS}.get({"sqa": "scienceqa"}.get(name, name))
    if found is None:
        raise ValueError(f"{name!r} is not a benchmark; choose among {', '.join(NAMES)}")
    return found
