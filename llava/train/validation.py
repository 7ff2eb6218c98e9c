"""Validation while training: the loss on rows held out, and how many of their questions are answered right.

Nothing of the training is touched by it: random numbers, modes of the modules and gradients are as before.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.dataset import SupervisedCollator, SupervisedDataset
from llava.data.records import EncodedRecord
from llava.data.split import ranked, split_rows
from llava.data.vqa_normalize import ANSWER_TYPES, normalize_answer, type_of_normalized
from llava.inference.session import Prompt, Sampling, Session

logger = logging.getLogger(__name__)

KINDS = tuple(kind.replace("/", "_") for kind in ANSWER_TYPES)


class Question(NamedTuple):
    """A supervised turn to be answered: the row up to it, as it was trained, and the true answer."""

    prompt: EncodedRecord
    answer: str
    tokens: int
    """Of the answer, with what ends it."""


class Share(NamedTuple):
    """What one process does: rows, of which the first `counted` count; all processes have the same number."""

    rows: list[int]
    counted: int


@dataclass(frozen=True)
class Validator:
    """What is measured, and how.

    Attributes:
        rows: for the loss.
        collator: of the rows.
        questions: for the accuracy; none = the loss alone.
        prompts: of the questions.
        session: the model that learns, not wrapped by the trainer, with tokenizer and template.
        max_new_tokens: longest answer, in tokens.
        batch_size: of rows and questions, on each process.
        workers: processes that read images.
    """

    rows: SupervisedDataset
    collator: SupervisedCollator
    questions: Sequence[Question]
    prompts: SupervisedDataset
    session: Session
    max_new_tokens: int
    batch_size: int
    workers: int

    def describe(self) -> str:
        """Return how much is measured, in words."""
        images = {path for record in self.rows.records for path in record.images}
        return f"{len(self.rows):,} rows, {len(images):,} images, {len(self.questions):,} questions"

    def measure(self, model: nn.Module, rank: int = 0, processes: int = 1) -> dict[str, float]:
        """Return the metrics; every process must call it.

        Args:
            model: that learns, as the trainer wraps it.
            rank: of this process.
            processes: how many there are.
        """
        device = self.session.model.device
        with undisturbed(model, device):
            loss, tokens = self._loss(model, device, rank, processes)
            right, asked = self._count(self._answers(rank, processes))
        sums = [loss, tokens, *(count[kind] for count in (right, asked) for kind in KINDS)]
        loss, tokens, *counts = _summed(sums, device, processes)
        return {"loss": loss / tokens, **accuracies(counts[: len(KINDS)], counts[len(KINDS) :])}

    def _loss(self, model: nn.Module, device: torch.device, rank: int, processes: int) -> tuple[float, int]:
        """Return the sum of the losses of this process's tokens, and their number."""
        share = spread(len(self.rows), rank, processes)
        total, tokens, seen = 0.0, 0, 0
        for batch in self._batches(self.rows, share.rows, self.collator):
            labels = batch["labels"]
            labels[max(share.counted - seen, 0) :] = IGNORE_INDEX  # a row that fills up for another process's
            seen += len(labels)
            inputs = {name: moved(value, device) for name, value in batch.items()}
            total += model(**inputs, num_items_in_batch=1, use_cache=False).loss.item()
            tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        return total, tokens

    def _count(self, answers: Iterable[tuple[int, str]]) -> tuple[Counter[str], Counter[str]]:
        """Return how many questions were answered right, and asked, by kind."""
        right, asked = Counter(), Counter()
        for question, answer in answers:
            true = self.questions[question].answer
            asked[kind_of(true)] += 1
            right[kind_of(true)] += normalize_answer(answer) == normalize_answer(true)
        return right, asked

    def _answers(self, rank: int, processes: int) -> Iterator[tuple[int, str]]:
        """Yield the number and the answer of each of this process's questions."""
        share = spread(len(self.questions), rank, processes)
        sampling = Sampling(max_new_tokens=self.max_new_tokens)
        seen = 0
        for batch in self._batches(self.prompts, share.rows, list):
            prompts = [Prompt(row["input_ids"].tolist(), row["images"]) for row in batch]
            if not any(prompt.pixel_values for prompt in prompts):  # the encoder runs in every process or in none
                size = self.collator.image_size
                prompts[0] = prompts[0]._replace(pixel_values=[torch.zeros(3, size, size)])
            answers = self.session.answer_prompts(prompts, sampling)
            yield from zip(share.rows[seen : share.counted], answers, strict=False)
            seen += len(batch)

    def _batches(self, dataset: Dataset, rows: Sequence[int], collate: object) -> DataLoader:
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=rows,
            collate_fn=collate,
            num_workers=self.workers,
            generator=torch.Generator(),  # of its own: a loader draws from it
        )


def hold_out(
    records: Sequence[EncodedRecord], share: float, seed: int
) -> tuple[list[EncodedRecord], list[EncodedRecord]]:
    """Split encoded records so that no image, and no repeated row of text alone, is on both sides.

    Returns:
        (training records, validation records), each in the order of the data.

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
    """Log how many images of the validation data are trained on too."""
    images = [{path.resolve() for record in records for path in record.images} for records in (training, validation)]
    if shared := len(images[0] & images[1]):
        logger.warning(
            "%d of %d images of --eval_data_path are in --data_path too; validation will look better than it is, so "
            "split by image (--val_share does)",
            shared,
            len(images[1]),
        )


def find_questions(records: Sequence[EncodedRecord], session: Session) -> list[Question]:
    """Return every supervised turn of the records as a question, with the turns before it as they were trained."""
    questions = []
    for record in records:
        ids = record.input_ids
        for start, stop in supervised_stretches(record.labels):
            images = record.images[: ids[:start].count(IMAGE_TOKEN_INDEX)]
            prompt = EncodedRecord(ids[:start], [IGNORE_INDEX] * start, images)
            questions.append(Question(prompt, session.decode(ids[start:stop]), stop - start))
    return questions


def supervised_stretches(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop of each run of supervised positions."""
    flags = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [place for place in range(len(labels) + 1) if flags[place] != flags[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def choose_questions(questions: Sequence[Question], most: int, max_tokens: int) -> list[Question]:
    """Choose the questions to ask, the same ones in every evaluation and run.

    Questions whose true answer is longer than `max_tokens` can't be answered right within it; they are left out, and
    the log says so.

    Args:
        questions: from `find_questions`.
        most: at most so many.
        max_tokens: of an answer.

    Returns:
        the chosen ones, those of similar length beside each other.
    """
    short = [question for question in questions if question.tokens <= max_tokens]
    if most and len(short) < len(questions):
        logger.info(
            "accuracy leaves out %d of %d questions, whose answers are longer than --eval_max_new_tokens %d",
            len(questions) - len(short),
            len(questions),
            max_tokens,
        )
    chosen = [short[place] for place in ranked(range(len(short)), 0)[:most]]
    return sorted(chosen, key=lambda question: len(question.prompt.input_ids))


def kind_of(answer: str) -> str:
    """Return the kind of a question by its true answer: yes_no, number or other."""
    return type_of_normalized(normalize_answer(answer)).replace("/", "_")


def accuracies(right: Sequence[float], asked: Sequence[float]) -> dict[str, float]:
    """Return the accuracy, 0..1, over all and by kind, of the kinds that were asked.

    Args:
        right: answers, by kind in the order of `KINDS`.
        asked: questions, likewise.
    """
    if not sum(asked):
        return {}
    by_kind = {f"accuracy_{kind}": hits / total for kind, hits, total in zip(KINDS, right, asked, strict=True) if total}
    return {"accuracy": sum(right) / sum(asked), **by_kind, "questions": sum(asked)}


def spread(count: int, rank: int, processes: int) -> Share:
    """Return what one process does of `count` rows; where they don't divide, row 0 fills up and doesn't count."""
    rows = list(range(rank, count, processes))
    counted = len(rows)
    return Share(rows + [0] * (-(-count // processes) - counted), counted)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model into eval mode without gradients; afterwards its modes and all random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            # in eval mode bitsandbytes lays 4-bit weights out anew on the CPU, and no gradient passes them afterwards
            for module, _ in modes:
                module.training = hasattr(getattr(module, "weight", None), "quant_state")
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Return a tensor, or each of several, on a device."""
    return value.to(device) if isinstance(value, Tensor) else [tensor.to(device) for tensor in value]


def _summed(values: Sequence[float], device: torch.device, processes: int) -> list[float]:
    """Return the sums over all processes."""
    if processes == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()
