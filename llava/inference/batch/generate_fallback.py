"""Batch inference through transformers' `generate`, for beam search and models that the engine can't run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.image_files.paths import resolve_image
from llava.inference.batch.answers_file import Answer
from llava.inference.batch.questions import Question
from llava.inference.prompts import PromptError
from llava.inference.session import Prompt, Sampling, Session

BATCHES_AHEAD = 2  # whose images are decoded
CPU_BATCH_SIZE = 8
MAX_BATCH_SIZE = 32
THREADS = 4  # that decode images
# LLaVA-1.5-7B in 16 bit, computed from its sizes, not measured.
_WEIGHTS_GIB = 14.0
_SEQUENCE_GIB = 0.5  # KV cache and activations
_RESERVE_GIB = 1.0


def default_batch_size(device: torch.device) -> int:
    """Return how many questions LLaVA-1.5-7B answers at a time on a device without filling it.

    It depends on the device's size, not on what is free now, so that a resumed run has the same batches.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max(1, min(MAX_BATCH_SIZE, int((total - _WEIGHTS_GIB - _RESERVE_GIB) / _SEQUENCE_GIB)))


def generate_answers(
    session: Session,
    questions: Sequence[Question],
    image_folder: str | Path,
    sampling: Sampling,
    *,
    batch_size: int | None = None,
) -> Iterator[Answer]:
    """Yield the answers in the order of the questions.

    An answer depends on its question and the seed alone.

    Args:
        session: model and template.
        questions: of the run.
        image_folder: holds their images; no image is read from outside, unless it is "".
        sampling: how answers are chosen.
        batch_size: questions at a time; None = what fits the device.

    Raises:
        ValueError: if a question has images and the model no vision tower.
    """
    size = batch_size or default_batch_size(session.model.device)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="images")
    ahead: deque[tuple[Sequence[Question], list[Future[Prompt | Answer]]]] = deque()
    try:
        for first in range(0, len(questions), size):
            batch = questions[first : first + size]
            ahead.append((batch, [pool.submit(_prepare, session, each, image_folder, sampling) for each in batch]))
            if len(ahead) > BATCHES_AHEAD:
                yield from _generate_batch(session, *ahead.popleft(), sampling)
        while ahead:
            yield from _generate_batch(session, *ahead.popleft(), sampling)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(session: Session, question: Question, image_folder: str | Path, sampling: Sampling) -> Prompt | Answer:
    """Return the prompt of a question, or why it can't be answered."""
    try:
        images = [open_image(resolve_image(image_folder, name)) for name in question.images]
        return session.prepare(question.text, images, max_new_tokens=sampling.max_new_tokens)
    except (ImageError, PromptError) as error:
        return Answer(question, "", error.code, str(error))


def _generate_batch(
    session: Session, questions: Sequence[Question], tasks: Sequence[Future[Prompt | Answer]], sampling: Sampling
) -> Iterator[Answer]:
    prepared = [task.result() for task in tasks]
    asked = [(prompt, each) for prompt, each in zip(prepared, questions, strict=True) if isinstance(prompt, Prompt)]
    prompts, request_ids = [prompt for prompt, _ in asked], [question.request_id for _, question in asked]
    texts = iter(session.answer_prompts(prompts, sampling, request_ids))
    for prompt, question in zip(prepared, questions, strict=True):
        yield prompt if isinstance(prompt, Answer) else Answer(question, next(texts))
