"""Batch inference through transformers' `generate`, for beam search and models that the engine can't run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.image_files.image_source import ImageSource
from llava.inference.batch.answers_file import Answer
from llava.inference.batch.questions import Question
from llava.inference.engine.image_loader import prefetch_session_images
from llava.inference.engine.limits import Limits
from llava.inference.engine.sequence import RequestError
from llava.inference.prompts import PromptError
from llava.inference.session import Prompt, Sampling, Session

CPU_BATCH_SIZE = 8
MAX_BATCH_SIZE = 32
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
    image_folder: str | Path | ImageSource,
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    threaded_groups: int = Limits.threaded_groups,
) -> Iterator[Answer]:
    """Yield the answers in the order of the questions.

    An answer depends on its question and the seed alone.

    Args:
        session: model and template.
        questions: of the run.
        image_folder: holds their images; no image is read from outside, unless it is "".
            An `ImageSource` has further images.
        sampling: how answers are chosen.
        batch_size: questions at a time; None = what fits the device.
        workers: processes that decode images; 0 = threads, None = what suits the device.
        threaded_groups: first questions, whose images are read by threads while processes start.

    Raises:
        ValueError: if a question has images and the model no vision tower.
        WorkerKilled: if processes are killed twice.
    """
    if any(question.images for question in questions):
        session.require_vision_tower()
    size = batch_size or default_batch_size(session.model.device)
    names = (question.images for question in questions)
    images = prefetch_session_images(session, image_folder, names, workers=workers, threaded_groups=threaded_groups)
    with contextlib.closing(images):
        for first in range(0, len(questions), size):
            batch = questions[first : first + size]
            prepared = [_prepare(session, question, next(images), sampling) for question in batch]
            yield from _generate_batch(session, prepared, batch, sampling)


def _prepare(
    session: Session, question: Question, pixel_values: list[Tensor] | RequestError, sampling: Sampling
) -> Prompt | Answer:
    """Return the prompt of a question, or why it can't be answered."""
    if isinstance(pixel_values, RequestError):
        return Answer(question, "", *pixel_values)
    try:
        prompt = Prompt(session.prompt_ids(question.text, len(pixel_values)), pixel_values)
        session.answer_limit(session.spliced_length(prompt), sampling.max_new_tokens)
    except PromptError as error:
        return Answer(question, "", error.code, str(error))
    return prompt


def _generate_batch(
    session: Session, prepared: Sequence[Prompt | Answer], questions: Sequence[Question], sampling: Sampling
) -> Iterator[Answer]:
    asked = [(prompt, each) for prompt, each in zip(prepared, questions, strict=True) if isinstance(prompt, Prompt)]
    prompts, request_ids = [prompt for prompt, _ in asked], [question.request_id for _, question in asked]
    texts = iter(session.answer_prompts(prompts, sampling, request_ids))
    for prompt, question in zip(prepared, questions, strict=True):
        yield prompt if isinstance(prompt, Answer) else Answer(question, next(texts))
