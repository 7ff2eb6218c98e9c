"""The original's evaluation functions: chunks of a question file, answers as captions, ST-VQA scores."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from llava.eval.benchmarks.textvqa import EvalAIAnswerProcessor
from llava.inference.batch.questions import split_chunk

Item = TypeVar("Item")
_FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("model_path", "model_base", "image_folder", "question_file", "answers_file", "conv_mode")
} | {"num_chunks": "--num-chunks", "chunk_idx": "--chunk-idx", "temperature": "--temperature"}
_FLAGS |= {name: f"--{name}" for name in ("top_p", "num_beams", "max_new_tokens")}
_ANLS_THRESHOLD = 0.5


def split_list(lst: Sequence[Item], n: int) -> list[list[Item]]:
    """Return `n` consecutive parts whose sizes differ by one at most; the original's could be fewer."""
    return [split_chunk(lst, n, index) for index in range(n)]


def get_chunk(lst: Sequence[Item], n: int, k: int) -> list[Item]:
    """Return part `k`, from 0, of `split_list`.

    Raises:
        ValueError: if there is no such part.
    """
    return split_chunk(lst, n, k)


def eval_model(args: Any) -> None:
    """Answer a question file, as `python -m llava.eval.model_vqa_loader` does.

    Args:
        args: object with that program's flags as attributes, `model_path`, `question_file` and `answers_file` at least.

    Raises:
        RuntimeError: if it stopped; its messages are on stderr.
        SystemExit: if a flag's value is unusable.
    """
    _run("model_vqa_loader", args, _FLAGS)


def eval_model_science(args: Any) -> None:
    """Answer ScienceQA, as `python -m llava.eval.model_vqa_science` does; arguments and errors as of `eval_model`."""
    _run("model_vqa_science", args, {**_FLAGS, "single_pred_prompt": "--single-pred-prompt"})


def eval_model_mmbench(args: Any) -> None:
    """Answer MMBench, as `python -m llava.eval.model_vqa_mmbench` does; arguments and errors as of `eval_model`."""
    names = ("single_pred_prompt", "all_rounds", "lang")
    _run("model_vqa_mmbench", args, _FLAGS | {name: f"--{name.replace('_', '-')}" for name in names})


def _run(program: str, args: Any, flags: Mapping[str, str]) -> None:
    given = {flag: getattr(args, name, None) for name, flag in flags.items()}
    argv = []
    for flag, value in given.items():
        if value is not None and value is not False:
            argv += [flag] if value is True else [flag, str(value)]
    code = importlib.import_module(f"llava.eval.{program}").main(argv)
    if code > 1:
        raise RuntimeError(f"{program} stopped with exit code {code}; its messages are above")


def convert_caps(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return answers as captions, `{image_id, caption}`; the id of a question is a number."""
    return [{"image_id": int(result["question_id"]), "caption": result["text"]} for result in results]


class STVQAAccuracyEvaluator:
    """Accuracy of ST-VQA: an answer counts if it equals one of the true ones, normalised."""

    answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean accuracy, 0..1; entries have `pred_answer` and `gt_answers`."""
        normalise = self.answer_processor
        pairs = [(normalise(entry["pred_answer"]), map(normalise, entry["gt_answers"])) for entry in pred_list]
        return _mean([float(answer in truths) for answer, truths in pairs])


class STVQAANLSEvaluator:
    """Average normalised Levenshtein similarity of ST-VQA; below 0.5 it counts as 0."""

    def get_anls(self, s1: str, s2: str) -> float:
        """Return the similarity of two answers, 0 or 0.5..1."""
        first, second = s1.lower().strip(), s2.lower().strip()
        longest = max(len(first), len(second))
        similarity = 1.0 if not longest else 1 - edit_distance(first, second) / longest
        return similarity if similarity >= _ANLS_THRESHOLD else 0.0

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean similarity to the nearest true answer; entries have `pred_answer` and `gt_answers`."""
        pairs = [(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list]
        return _mean([max(self.get_anls(answer, truth) for truth in truths) for answer, truths in pairs])


def edit_distance(first: str, second: str) -> int:
    """Return how many characters have to be inserted, deleted or replaced to turn one text into the other."""
    row = list(range(len(second) + 1))
    for count, character in enumerate(first, start=1):
        above, row = row, [count]
        for index, other in enumerate(second):
            row.append(min(above[index] + (character != other), above[index + 1] + 1, row[index] + 1))
    return row[-1]


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise ValueError("there are no answers to score")
    return sum(scores) / len(scores)
