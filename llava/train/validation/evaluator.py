"""Validation during training: loss on held-out rows, and accuracy of the answers to their questions.

It leaves training unchanged: random generators, train and eval modes and gradients are restored.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.dataset import SupervisedCollator, SupervisedDataset
from llava.data.records import EncodedRecord
from llava.data.split import ranked, split_rows
from llava.data.vqa_normalize import ANSWER_TYPES, normalize_answer, type_of_normalized
from llava.data.worker_processes import RestartingLoader
from llava.inference.session import Prompt, Sampling, Session
from llava.train.fault_tolerance.data_workers import FEWER_WORKERS
from llava.train.validation.mistakes import Mistake

logger = logging.getLogger(__name__)

TYPES = tuple(name.replace("/", "_") for name in ANSWER_TYPES)


class ValidationQuestion(NamedTuple):
    """A supervised turn as a question.

    Attributes:
        prompt: the record up to the answer, encoded as in training.
        answer: the true answer.
        tokens: length of the answer, its end token included.
    """

    prompt: EncodedRecord
    answer: str
    tokens: int


class RankRows(NamedTuple):
    """Rows of one rank, the same number on every rank; only the first `counted` count, the rest are padding."""

    rows: list[int]
    counted: int


@dataclass(frozen=True)
class Evaluator:
    """Measures loss and accuracy on held-out records.

    Attributes:
        rows: dataset for the loss.
        collator: makes batches of `rows`.
        questions: for the accuracy; empty = loss only.
        prompts: dataset of the questions' prompts.
        session: tokenizer, template and the trained model, not wrapped by the trainer.
        max_new_tokens: of an answer.
        batch_size: rows or questions per process.
        workers: processes that read images.
        mistakes: the wrong answers of this process in the last measurement.
    """

    rows: SupervisedDataset
    collator: SupervisedCollator
    questions: Sequence[ValidationQuestion]
    prompts: SupervisedDataset
    session: Session
    max_new_tokens: int
    batch_size: int
    workers: int
    mistakes: list[Mistake] = field(default_factory=list)

    def describe(self) -> str:
        """Return the number of rows, images and questions, for the run summary."""
        images = {path for record in self.rows.records for path in record.images}
        return f"{len(self.rows):,} rows, {len(images):,} images, {len(self.questions):,} questions"

    def measure(self, model: nn.Module, rank: int = 0, world_size: int = 1) -> dict[str, float]:
        """Return the metrics of a model, as the trainer wraps it; every process must call it."""
        device = self.session.model.device
        with eval_mode(model, device):
            loss, tokens = self._loss(model, device, rank, world_size)
            right, asked = self._count(self._answers(rank, world_size))
        sums = [loss, tokens, *(count[name] for count in (right, asked) for name in TYPES)]
        loss, tokens, *counts = _sum_over_ranks(sums, device, world_size)
        return {"loss": loss / tokens, **accuracies(counts[: len(TYPES)], counts[len(TYPES) :])}

    def _loss(self, model: nn.Module, device: torch.device, rank: int, world_size: int) -> tuple[float, int]:
        """Return the sum of the losses of this rank's supervised tokens, and their number."""
        mine = rows_of_rank(len(self.rows), rank, world_size)
        total, tokens, seen = 0.0, 0, 0
        for batch in self._batches(self.rows, mine.rows, self.collator):
            labels = batch["labels"]
            labels[max(mine.counted - seen, 0) :] = IGNORE_INDEX  # padding rows
            seen += len(labels)
            inputs = {name: to_device(value, device) for name, value in batch.items()}
            total += model(**inputs, num_items_in_batch=1, use_cache=False).loss.item()
            tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        return total, tokens

    def _count(self, answers: Iterable[tuple[int, str]]) -> tuple[Counter[str], Counter[str]]:
        """Return the number of right answers and of questions, by type; note the mistakes."""
        right, asked = Counter(), Counter()
        self.mistakes.clear()
        for question, answer in answers:
            prompt, true, _ = self.questions[question]
            is_right = normalize_answer(answer) == normalize_answer(true)
            asked[answer_type(true)] += 1
            right[answer_type(true)] += is_right
            if not is_right:
                self.mistakes.append(Mistake(question, prompt, true, answer))
        return right, asked

    def _answers(self, rank: int, world_size: int) -> Iterator[tuple[int, str]]:
        """Yield index and answer of each of this rank's questions."""
        mine = rows_of_rank(len(self.questions), rank, world_size)
        sampling = Sampling(max_new_tokens=self.max_new_tokens)
        seen = 0
        for batch in self._batches(self.prompts, mine.rows, list):
            prompts = [Prompt(row["input_ids"].tolist(), row["images"]) for row in batch]
            if not any(prompt.pixel_values for prompt in prompts):  # ZeRO-3: it runs in every process
                size = self.collator.image_size
                prompts[0] = prompts[0]._replace(pixel_values=[torch.zeros(3, size, size)])
            answers = self.session.answer_prompts(prompts, sampling)
            yield from zip(mine.rows[seen : mine.counted], answers, strict=False)
            seen += len(batch)

    def _batches(self, dataset: Dataset, rows: Sequence[int], collate: object) -> RestartingLoader:
        return RestartingLoader(
            dataset,
            BatchSampler(rows, self.batch_size, drop_last=False),
            way_out=FEWER_WORKERS,
            collate_fn=collate,
            num_workers=self.workers,
            generator=torch.Generator(),  # a loader draws from its generator, which must not be training's
        )


def hold_out(
    records: Sequence[EncodedRecord], share: float, seed: int
) -> tuple[list[EncodedRecord], list[EncodedRecord]]:
    """Split records into training and validation so that no image and no repeated text-only row is in both.

    Returns:
        training records, validation records; both in the order of the data.

    Raises:
        ValueError: as `split_rows`.
    """
    names = [[path.name for path in record.images] or [f"text {record.input_ids}"] for record in records]
    is_held_out = split_rows(names, share, seed)
    return (
        [record for record, flag in zip(records, is_held_out, strict=True) if not flag],
        [record for record, flag in zip(records, is_held_out, strict=True) if flag],
    )


def warn_of_shared_images(training: Sequence[EncodedRecord], validation: Sequence[EncodedRecord]) -> None:
    """Log a warning if validation images are also trained on."""
    images = [{path.resolve() for record in records for path in record.images} for records in (training, validation)]
    if shared := len(images[0] & images[1]):
        logger.warning(
            "%d of %d images of --eval_data_path are in --data_path too; validation will look better than it is, so "
            "split by image (--val_share does)",
            shared,
            len(images[1]),
        )


def find_questions(records: Sequence[EncodedRecord], session: Session) -> list[ValidationQuestion]:
    """Return every supervised turn of the records as a question, with the turns before it encoded as in training."""
    questions = []
    for record in records:
        ids = record.input_ids
        for start, stop in supervised_spans(record.labels):
            images = record.images[: ids[:start].count(IMAGE_TOKEN_INDEX)]
            prompt = EncodedRecord(ids[:start], [IGNORE_INDEX] * start, images)
            questions.append(ValidationQuestion(prompt, session.decode(ids[start:stop]), stop - start))
    return questions


def supervised_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of supervised tokens."""
    flags = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [place for place in range(len(labels) + 1) if flags[place] != flags[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def choose_questions(questions: Sequence[ValidationQuestion], limit: int, max_tokens: int) -> list[ValidationQuestion]:
    """Choose the questions to answer, the same in every validation and run.

    Questions whose true answer is longer than `max_tokens` can't be answered right; they are left out and logged.

    Args:
        questions: from `find_questions`.
        limit: most questions.
        max_tokens: of an answer.

    Returns:
        the chosen questions, sorted by length.
    """
    short = [question for question in questions if question.tokens <= max_tokens]
    if limit and len(short) < len(questions):
        logger.info(
            "accuracy leaves out %d of %d questions, whose answers are longer than --eval_max_new_tokens %d",
            len(questions) - len(short),
            len(questions),
            max_tokens,
        )
    chosen = [short[place] for place in ranked(range(len(short)), 0)[:limit]]
    return sorted(chosen, key=lambda question: len(question.prompt.input_ids))


def answer_type(answer: str) -> str:
    """Return VQAv2's type of a true answer: yes_no, number or other."""
    return type_of_normalized(normalize_answer(answer)).replace("/", "_")


def accuracies(right: Sequence[float], asked: Sequence[float]) -> dict[str, float]:
    """Return the accuracy, 0..1, over all questions and by answer type.

    Args:
        right: number of right answers of each of `TYPES`.
        asked: number of questions of each of `TYPES`.
    """
    if not sum(asked):
        return {}
    by_type = {f"accuracy_{name}": hits / total for name, hits, total in zip(TYPES, right, asked, strict=True) if total}
    return {"accuracy": sum(right) / sum(asked), **by_type, "questions": sum(asked)}


def rows_of_rank(count: int, rank: int, world_size: int) -> RankRows:
    """Return one rank's part of `count` rows; if they don't divide evenly, row 0 is added as padding."""
    rows = list(range(rank, count, world_size))
    counted = len(rows)
    return RankRows(rows + [0] * (-(-count // world_size) - counted), counted)


@contextlib.contextmanager
def eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients; afterwards the modules' modes and the random generators are restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            # in eval mode bitsandbytes repacks 4-bit weights on the CPU, and gradients no longer pass through them
            for module, _ in modes:
                module.training = hasattr(getattr(module, "weight", None), "quant_state")
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or each tensor of a list or dictionary, to a device."""
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device) if isinstance(value, Tensor) else [tensor.to(device) for tensor in value]


def _sum_over_ranks(values: Sequence[float], device: torch.device, world_size: int) -> list[float]:
    if world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()
