"""Many questions, answered in batches: pictures are decoded ahead by threads, a bad row becomes an error of its own."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from llava.image_processing import ImageError, open_image, resolve_image
from llava.inference.answers import Answer
from llava.inference.prompts import PromptError
from llava.inference.questions import Question
from llava.inference.session import Prompt, Sampling, Session

BATCHES_AHEAD = 2
CPU_BATCH_SIZE = 8
MAX_BATCH_SIZE = 32
# Counted from the model's sizes, not measured: weights by their bits, and a row's cache and activations on top.
_WEIGHTS_GIB = {16: 14.0, 8: 7.5, 4: 4.5}
_ROW_GIB = 0.5
_RESERVE_GIB = 1.0


def default_batch_size(device: torch.device, bits: int) -> int:
    """Return how many questions LLaVA-1.5-7B answers at a time on a device without filling it.

    It depends on the device's size, not on what is free now, so that a run that is continued has the same batches.

    Args:
        device: where the model runs.
        bits: of its weights: 16, 8 or 4.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max(1, min(MAX_BATCH_SIZE, int((total - _WEIGHTS_GIB[bits] - _RESERVE_GIB) / _ROW_GIB)))


def answer_questions(
    session: Session,
    questions: Sequence[Question],
    image_folder: str | Path,
    sampling: Sampling,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 4,
) -> Iterator[Answer]:
    """Yield the answers in the order of the questions.

    Batches are the same wherever the run starts, and with a seed each has its own, so a continued run gives the answers
    of an uninterrupted one.

    Args:
        session: model and template.
        questions: all of the run.
        image_folder: holds their images; no image is read from outside.
        sampling: how answers are chosen.
        batch_size: questions at a time.
        start: first question whose answer is wanted.
        workers: threads that decode images.

    Raises:
        ValueError: if the batch size is below 1, or a question has images and the model no image encoder.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; choose 1 or more")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    ahead: deque[tuple[int, list[Future[Prompt | Answer]]]] = deque()
    try:
        for first in range(start - start % batch_size, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            tasks = [pool.submit(_prepare, session, question, image_folder, sampling) for question in batch]
            ahead.append((first, tasks))
            if len(ahead) > BATCHES_AHEAD:
                yield from _answer_batch(session, questions, *ahead.popleft(), sampling, start)
        while ahead:
            yield from _answer_batch(session, questions, *ahead.popleft(), sampling, start)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(session: Session, question: Question, image_folder: str | Path, sampling: Sampling) -> Prompt | Answer:
    """Return what the model takes, or the error of a bad row."""
    try:
        images = [open_image(resolve_image(image_folder, name)) for name in question.images]
        return session.prepare(question.text, images, max_new_tokens=sampling.max_new_tokens)
    except (ImageError, PromptError) as error:
        return Answer(question, "", error.code, str(error))


def _answer_batch(
    session: Session,
    questions: Sequence[Question],
    first: int,
    tasks: Sequence[Future[Prompt | Answer]],
    sampling: Sampling,
    start: int,
) -> Iterator[Answer]:
    prepared = [task.result() for task in tasks]
    prompts = [prompt for prompt in prepared if isinstance(prompt, Prompt)]
    if sampling.seed is not None:
        sampling = dataclasses.replace(sampling, seed=sampling.seed + first)
    texts = iter(session.answer_prompts(prompts, sampling))
    for index, row in enumerate(prepared, start=first):
        answer = row if isinstance(row, Answer) else Answer(questions[index], next(texts))
        if index >= start:
            yield answer
