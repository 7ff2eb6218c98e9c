"""Questions about the shapes world, in VQAv2's style, with answers of one to three words.

Old kinds are what the base model is trained on, new kinds are the task. Every answer follows from the scene alone.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from known_questions import CAPTION_FORMS, OLD_FORMS
from phrases import Form
from scenes import Scene
from task_questions import NEW_FORMS

FORMS: dict[str, tuple[Form, ...]] = {**OLD_FORMS, **NEW_FORMS, **CAPTION_FORMS}
OLD_KINDS = tuple(OLD_FORMS)
NEW_KINDS = tuple(NEW_FORMS)


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        kind: one of `OLD_KINDS` or `NEW_KINDS`, or a kind of caption.
        text: what is asked.
        answer: the one right answer, lower case.
    """

    kind: str
    text: str
    answer: str


def ask(kind: str, scene: Scene, rng: random.Random, tally: Counter[tuple[str, str]]) -> Question | None:
    """Ask one question of a kind, with the answer that was given least often so far.

    Args:
        kind: a key of `FORMS`.
        scene: what the question is about.
        rng: chooses among wordings and among questions with the same answer.
        tally: how often each (wording, answer) was used; it is updated, so that answers stay balanced.

    Returns:
        the question, or None where the scene allows none of this wording.
    """
    form = rng.choice(FORMS[kind])
    candidates = form(scene, rng)
    if not candidates:
        return None
    roles = [answer_role(*candidate) for candidate in candidates]
    usage = {role: (tally[form.__name__, role], rng.random()) for role in sorted(set(roles))}
    rarest = min(usage, key=usage.__getitem__)
    tally[form.__name__, rarest] += 1
    text, answer = rng.choice([candidate for candidate, role in zip(candidates, roles, strict=True) if role == rarest])
    return Question(kind, text, answer)


def answer_role(text: str, answer: str) -> str:
    """What is balanced: the answer, or in "which" questions whether it is the first or the second that was named."""
    if not text.startswith("Which") or answer not in text:
        return answer
    return "first" if text.index(answer) < text.index(" or ") else "second"
