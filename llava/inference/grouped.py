"""Answers to many questions, as they come: `answer_batch`, which plans, reads pictures ahead and runs the engine."""

from __future__ import annotations

import contextlib
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.inference.answers import Answer
from llava.inference.backlog import Backlog, Failed
from llava.inference.batch import answer_questions, default_batch_size
from llava.inference.engine import Engine
from llava.inference.grouping import MAX_BRANCHES, Ask, Branch, Group, deal_groups, plan_groups, spliced_length
from llava.inference.picture_source import THREADS, PictureReader, default_workers, read_pictures
from llava.inference.prompts import PromptError, answered_ids
from llava.inference.questions import Question
from llava.inference.selection import chance
from llava.inference.session import Sampling, Session
from llava.model.flat_llama import has_plain_weights, is_flat

COMPILE_MODES = ("auto", "on", "off")
COMPILE_FROM = 2_500_000
"""Positions from which on compiling pays, on CUDA."""
_REMEMBERED_TEXTS = 64
"""The text in front of the first image is that of the question before."""
DIGITS = 4
"""Of logprobs in records."""


def answer_batch(
    session: Session,
    questions: Sequence[Question],
    image_folder: str | Path = "",
    sampling: Sampling | None = None,
    *,
    batch_size: int | None = None,
    with_scores: bool = False,
    choices: Sequence[str] = (),
    compile_mode: str = "auto",
    workers: int | None = None,
    done: Collection[int | str] = (),
    part: int = 0,
    parts: int = 1,
) -> Iterator[Answer]:
    """Answer questions in the order that suits the device, and yield each answer as soon as it is there.

    An answer depends neither on the order of the questions nor on what else is asked; by chance (temperature) it
    depends on seed and question id.

    Args:
        session: model and template.
        questions: all of the run; ids differ.
        image_folder: holds their images; no image is read from outside.
        sampling: how answers are chosen; None = greedy.
        batch_size: most questions at a time; None = what fits the device.
        with_scores: note how sure the model is, see `Answer.scores`.
        choices: score these answers instead of generating; the likeliest is the answer.
        compile_mode: `torch.compile` "on", "off", or "auto": for long runs on CUDA.
        workers: processes that decode images; 0 = threads, None = what suits the device.
        done: ids of questions that have their answer already.
        part: which share of the work is wanted, from 0.
        parts: shares of equal work, each of whole groups; with choices of whole questions.

    Yields:
        One answer per question of the share that is not done, errors of bad rows included.

    Raises:
        ValueError: if an option is out of range or does not go with another or with the model.
        torch.OutOfMemoryError: if a single question does not fit.
    """
    sampling = sampling or Sampling()
    _check_options(session, sampling, with_scores, choices, compile_mode, batch_size)
    if sampling.num_beams > 1 or not is_flat(session.model):
        rest = [question for question in questions[part::parts] if question.question_id not in done]
        yield from _answer_plainly(session, rest, image_folder, sampling, batch_size)
        return
    patches = session.model.get_vision_tower().num_patches if session.image_processor else 0
    asks, bad = _prepare(session, questions, choices)
    if choices and parts > 1:
        asks = _share_of_lists(asks, patches, part, parts)
    plan = plan_groups(asks, patches, max_branches=min(MAX_BRANCHES, batch_size or MAX_BRANCHES))
    dealt = plan.groups if choices else deal_groups(plan.groups, patches, parts)[part]
    groups = _unfinished(dealt, questions, frozenset(done))
    if part == 0:
        yield from (answer for answer in bad if answer.question.question_id not in done)
    if any(group.images for group in groups) and session.image_processor is None:
        raise ValueError("the model has no image encoder; ask without images, or pass --vision-tower")
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    pictures = _read_pictures(session, groups, image_folder, workers)
    engine = Engine(
        session,
        sampling,
        plan.stem_ids,
        chance_of=lambda key, step: chance(seed, questions[key].question_id, step),
        with_scores=with_scores,
        max_questions=batch_size,
        compiled=_is_compiled(session, groups, patches, compile_mode),
        graphed=compile_mode != "off" and session.model.device.type == "cuda" and has_plain_weights(session.model),
    )
    backlog = Backlog(
        session, len(plan.stem_ids), groups, pictures, room=sampling.max_new_tokens, is_padded=engine.is_compiled
    )
    with contextlib.closing(pictures), contextlib.closing(engine.run(backlog)) as results:
        yield from _as_answers(session, questions, results, choices)


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
    if compile_mode not in COMPILE_MODES:
        raise ValueError(f"compile_mode is {compile_mode!r}; choose {', '.join(COMPILE_MODES)}")
    if not (with_scores or choices):
        return
    if sampling.num_beams > 1:
        raise ValueError("scores and choices don't go with beam search; leave num_beams at 1")
    if not is_flat(session.model):
        raise ValueError("scores and choices need the model on one device, with rotary embeddings of fixed frequency")
    if choices and sampling.temperature > 0:
        raise ValueError("choices are scored, not sampled; leave temperature at 0")
    bad = [choice for choice in choices if not choice.strip()]
    if bad or len(set(choices)) < len(choices):
        raise ValueError(f"choices {list(choices)} are empty or repeated; give each answer once")


def _answer_plainly(
    session: Session,
    questions: Sequence[Question],
    image_folder: str | Path,
    sampling: Sampling,
    batch_size: int | None,
) -> Iterator[Answer]:
    """Answer through transformers' `generate`, for beams and for models on several devices."""
    size = batch_size or default_batch_size(session.model.device, 16)
    if sampling.temperature == 0 or sampling.seed is None:
        yield from answer_questions(session, questions, image_folder, sampling, batch_size=size)
        return
    for question in questions:  # chance of its own for each
        seed = int(chance(sampling.seed, question.question_id, 0) * 2**52)
        alone = Sampling(**{**vars(sampling), "seed": seed})
        yield from answer_questions(session, [question], image_folder, alone, batch_size=1)


def _prepare(session: Session, questions: Sequence[Question], choices: Sequence[str]) -> tuple[list[Ask], list[Answer]]:
    """Return the prompts, and the error records of questions that are no prompts."""
    asks: list[Ask] = []
    bad: list[Answer] = []
    use_im_start_end = session.model.config.mm_use_im_start_end
    encode_text = lru_cache(maxsize=_REMEMBERED_TEXTS)(session.tokenizer.encode_text)
    for key, question in enumerate(questions):
        n_images = len(question.images)
        try:
            if not choices:
                asks.append(
                    Ask(key, session.prompt_ids(question.text, n_images, encode_text=encode_text), question.images)
                )
                continue
            for number, choice in enumerate(choices):
                ids, targets = answered_ids(
                    question.text,
                    n_images,
                    choice,
                    session.template,
                    session.tokenizer,
                    use_im_start_end=use_im_start_end,
                )
                asks.append(Ask(key, ids, question.images, tuple(targets), number))
        except PromptError as error:
            bad.append(Answer(question, "", error.code, str(error)))
    return asks, bad


def _share_of_lists(asks: Sequence[Ask], patches: int, part: int, parts: int) -> list[Ask]:
    """Return the prompts of one share: a question is answered by who has scored its whole list."""
    firsts = plan_groups([ask for ask in asks if ask.choice == 0], patches)
    share = deal_groups(firsts.groups, patches, parts)[part]
    keys = {branch.ask.key for group in share for branch in group.branches}
    return [ask for ask in asks if ask.key in keys]


def _unfinished(groups: Sequence[Group], questions: Sequence[Question], done: frozenset[int | str]) -> list[Group]:
    """Return the groups with those branches that have no answer yet."""
    for group in groups:
        group.branches = [branch for branch in group.branches if questions[branch.ask.key].question_id not in done]
    return [group for group in groups if group.branches]


def _is_compiled(session: Session, groups: Sequence[Group], patches: int, mode: str) -> bool:
    if mode != "auto":
        return mode == "on"
    model = session.model
    if model.device.type != "cuda" or not has_plain_weights(model):
        return False
    positions = sum(spliced_length(group.trunk_ids, lambda: patches) + group.branch_length for group in groups)
    return positions >= COMPILE_FROM


def _read_pictures(
    session: Session, groups: Sequence[Group], image_folder: str | Path, workers: int | None
) -> Iterator[Any]:
    config, device = session.model.config, session.model.device
    settings = SimpleNamespace(
        image_aspect_ratio=config.image_aspect_ratio, image_grid_pinpoints=config.image_grid_pinpoints
    )
    dtype = session.model.get_vision_tower().dtype if session.image_processor else session.model.dtype
    reader = PictureReader(Path(image_folder), session.image_processor, settings, dtype)
    n_workers = default_workers(device) if workers is None else workers
    threads = max(THREADS, default_workers(device))
    return read_pictures(reader, [group.images for group in groups], workers=n_workers, threads=threads)


def _as_answers(
    session: Session, questions: Sequence[Question], results: Iterator[Branch | Failed], choices: Sequence[str]
) -> Iterator[Answer]:
    logprobs: dict[int, dict[int, float]] = defaultdict(dict)
    failed: set[int] = set()
    for result in results:
        if isinstance(result, Failed):
            key = result.branch.ask.key
            if key not in failed:  # of several choices the first is enough
                failed.add(key)
                yield Answer(questions[key], "", result.code, result.message)
            continue
        key = result.ask.key
        if not choices:
            yield Answer(questions[key], session.decode(result.generated), scores=_scores(session, result))
            continue
        logprobs[key][result.ask.choice] = sum(result.logprobs)
        if len(logprobs[key]) == len(choices):
            yield _best_choice(questions[key], choices, logprobs.pop(key))


def _scores(session: Session, branch: Branch) -> dict[str, Any] | None:
    if branch.runner_up is None:
        return None
    token, logprob = branch.runner_up
    return {
        "logprob": round(sum(branch.logprobs), DIGITS),
        "first_token_logprob": round(branch.logprobs[0], DIGITS),
        "runner_up": session.tokenizer.decode([token]),
        "runner_up_logprob": round(logprob, DIGITS),
    }


def _best_choice(question: Question, choices: Sequence[str], logprobs: Mapping[int, float]) -> Answer:
    rounded = {choice: round(logprobs[index], DIGITS) for index, choice in enumerate(choices)}
    best = max(choices, key=rounded.__getitem__)
    return Answer(question, best.strip(), scores={"choices": rounded, "logprob": rounded[best]})
