"""Batch inference: answers many questions with the batch engine, and yields each answer as soon as it is known."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.constants import SWITCH
from llava.image_files.image_source import ImageSource
from llava.inference.batch.answers_file import Answer
from llava.inference.batch.generate_fallback import generate_answers
from llava.inference.batch.questions import Question
from llava.inference.batch.windows import (
    ImageGroup,
    RequestsOf,
    Windows,
    estimate_positions,
    find_system_prefix,
    group_by_images,
    request_builder,
)
from llava.inference.engine.engine import Engine
from llava.inference.engine.image_loader import prefetch_session_images
from llava.inference.engine.limits import Limits
from llava.inference.engine.prefix_groups import common_system_prefix, split_work
from llava.inference.engine.ragged_llama import can_be_captured, supports_ragged
from llava.inference.engine.sequence import Sequence as AnswerSequence
from llava.inference.session import Sampling, Session
from llava.model.capabilities import capabilities_of

COMPILE_FROM = 2_500_000  # positions of a run from which on compiling pays, on CUDA
DIGITS = 4  # of logprobs in records


def answer_batch(
    session: Session,
    questions: Sequence[Question],
    image_folder: str | Path | ImageSource = "",
    sampling: Sampling | None = None,
    *,
    batch_size: int | None = None,
    with_scores: bool = False,
    choices: Sequence[str] = (),
    compile_mode: str = "auto",
    workers: int | None = None,
    done: Collection[Question] = (),
    rank: int = 0,
    world_size: int = 1,
    limits: Limits | None = None,
) -> Generator[Answer, None, None]:
    """Answer questions in the order that suits the device, and yield each answer as soon as it is known.

    An answer depends neither on the order of the questions nor on the other questions; at a temperature above 0 it
    depends on the seed and the question itself.

    Args:
        session: model and template.
        questions: all of the run; no two are equal (`number_repeats` sees to it), their ids may be.
        image_folder: holds their images; no image is read from outside, unless it is "".
            An `ImageSource` has further images.
        sampling: how answers are chosen; None = greedy.
        batch_size: most running sequences; None = what fits the device.
        with_scores: add log-probabilities to the answers, see `Answer.scores`.
        choices: score these answers instead of generating; the likeliest is the answer.
        compile_mode: `torch.compile` "on", "off", or "auto": for long runs on CUDA.
        workers: processes that decode images; 0 = threads, None = what suits the device.
        done: questions that have their answer already; read when iteration starts.
        rank: distributed rank, which answers its part of the questions.
        world_size: ranks, with shares of equal work.
        limits: sizes of the run; None = what suits the device.

    Yields:
        One answer per question of the share that is not done, with its error if it can't be answered.

    Raises:
        ValueError: if an option is out of range or does not go with another or with the model.
        torch.OutOfMemoryError: if a single question does not fit.
    """
    sampling = (sampling or Sampling()).seeded()
    _check_options(session, sampling, with_scores, choices, compile_mode, batch_size)
    limits = limits or Limits.suiting(session.model.device, sampling.max_new_tokens)
    if sampling.num_beams > 1 or not supports_ragged(session.model):
        rest = [question for question in questions[rank::world_size] if question not in done]
        yield from generate_answers(
            session,
            rest,
            image_folder,
            sampling,
            batch_size=batch_size,
            workers=workers,
            threaded_groups=limits.threaded_groups,
        )
        return
    patches = session.model.get_vision_tower().num_patches if session.image_processor else 0
    requests_of = request_builder(session, choices)
    largest = limits.group_size
    limits = replace(limits, max_sequences=batch_size, group_size=min(largest, batch_size or largest))
    run = _Run(
        session, image_folder, sampling, with_scores, choices, compile_mode, workers, patches, requests_of, limits
    )
    system_prefix = find_system_prefix(questions, requests_of)  # of all: every rank and a resumed run have the same
    image_groups = group_by_images((question for question in questions if question not in done), largest)
    share = split_work(image_groups, lambda image_group: estimate_positions(image_group, patches), world_size)[rank]
    outside = yield from run.answer(share, system_prefix)
    if outside:
        system_prefix = common_system_prefix(request for question in outside for request in requests_of(question))
        yield from run.answer(group_by_images(outside, largest), system_prefix)


@dataclass(frozen=True)
class _Run:
    """Options of `answer_batch`, positions of an image, and what makes requests of a question."""

    session: Session
    image_folder: str | Path | ImageSource
    sampling: Sampling
    with_scores: bool
    choices: Sequence[str]
    compile_mode: str
    workers: int | None
    patches: int
    requests_of: RequestsOf
    limits: Limits

    def answer(
        self, image_groups: Sequence[ImageGroup], system_prefix: Sequence[int]
    ) -> Generator[Answer, None, list[Question]]:
        """Yield the answers; return the questions whose prompts don't start with the prefix, which are not answered."""
        session, n_choices = self.session, max(1, len(self.choices))
        if any(image_group[0].images for image_group in image_groups):
            session.require_vision_tower()
        limits = self.limits
        group_size = min(limits.group_size, n_choices * max(map(len, image_groups), default=1))
        limits, window = replace(limits, group_size=group_size), max(1, limits.window // n_choices)
        windows = Windows(self.requests_of, system_prefix, self.patches, group_size=group_size, size=window)
        groups, ahead = itertools.tee(windows.groups(image_groups))
        images = prefetch_session_images(
            session,
            self.image_folder,
            (group.images for group in ahead),
            workers=self.workers,
            threaded_groups=limits.threaded_groups,
        )
        positions = n_choices * sum(estimate_positions(image_group, self.patches) for image_group in image_groups)
        engine = self._engine(system_prefix, positions, limits)
        with contextlib.closing(images), contextlib.closing(engine.run(groups, images)) as sequences:
            for answer in _to_answers(session, sequences, self.choices):
                yield from windows.take_errors()
                yield answer
            yield from windows.take_errors()
        return windows.outside

    def _engine(self, system_prefix: Sequence[int], positions: int, limits: Limits) -> Engine:
        model, mode = self.session.model, self.compile_mode
        can, is_capturable = capabilities_of(model.device), can_be_captured(model)
        return Engine(
            self.session,
            self.sampling,
            system_prefix,
            with_scores=self.with_scores,
            limits=limits,
            compiled=mode == "on"
            or (mode == "auto" and can.has_triton and is_capturable and positions >= COMPILE_FROM),
            graphed=mode != "off" and can.has_cuda_graphs and is_capturable,
        )


def _check_options(
    session: Session,
    sampling: Sampling,
    with_scores: bool,
    choices: Sequence[str],
    compile_mode: str,
    batch_size: int | None,
) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; choose 1 or more")
    if compile_mode not in SWITCH:
        raise ValueError(f"compile_mode is {compile_mode!r}; choose {', '.join(SWITCH)}")
    if compile_mode == "on" and (reason := capabilities_of(session.model.device).refuse_compilation()):
        raise ValueError(f"compile_mode is 'on': {reason}; leave it out")
    if not (with_scores or choices):
        return
    if sampling.num_beams > 1:
        raise ValueError("scores and choices don't go with beam search; leave num_beams at 1")
    if not supports_ragged(session.model):
        raise ValueError("scores and choices need the model on one device, with rotary embeddings of fixed frequency")
    if choices and sampling.temperature > 0:
        raise ValueError("choices are scored, not sampled; leave temperature at 0")
    bad = [choice for choice in choices if not choice.strip()]
    if bad or len(set(choices)) < len(choices):
        raise ValueError(f"choices {list(choices)} are empty or repeated; give each answer once")


def _to_answers(session: Session, sequences: Iterator[AnswerSequence], choices: Sequence[str]) -> Iterator[Answer]:
    """Yield the answer of each question, once all its choices are scored or the first has failed."""
    logprobs: dict[Question, dict[str, float]] = defaultdict(dict)
    failed: set[Question] = set()
    for sequence in sequences:
        question = sequence.request.key
        if sequence.error:
            if question not in failed:
                failed.add(question)
                yield Answer(question, "", *sequence.error)
        elif not choices:
            yield Answer(question, session.decode(sequence.token_ids), scores=_scores(session, sequence))
        else:
            logprobs[question][choices[sequence.request.choice]] = round(sum(sequence.logprobs), DIGITS)
            if len(logprobs[question]) == len(choices):
                scored = {choice: logprobs[question][choice] for choice in choices}
                best = max(choices, key=scored.__getitem__)
                del logprobs[question]
                yield Answer(question, best.strip(), scores={"choices": scored, "logprob": scored[best]})


def _scores(session: Session, sequence: AnswerSequence) -> dict[str, Any] | None:
    if sequence.runner_up is None:
        return None
    token, logprob = sequence.runner_up
    return {
        "logprob": round(sum(sequence.logprobs), DIGITS),
        "first_token_logprob": round(sequence.logprobs[0], DIGITS),
        "runner_up": session.tokenizer.decode([token]),
        "runner_up_logprob": round(logprob, DIGITS),
    }
