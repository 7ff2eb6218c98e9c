"""Questions that finetuning adds: counting, spatial relations and comparisons; none is in the base's training."""

from __future__ import annotations

import random

from phrases import SIDES, Candidate, Form, is_at, pairs, pick
from scenes import Scene

RELATION_MARGIN = 20.0  # pixels by which two things must differ before one counts as further left or higher


def ask_total(scene: Scene, rng: random.Random) -> list[Candidate]:
    """How many things are there?"""
    return [("How many things are there?", str(len(scene.things)))]


def ask_count_at(scene: Scene, rng: random.Random) -> list[Candidate]:
    """How many things are at the top?"""
    counts = {side: sum(is_at(thing, side) for thing in scene.things) for side in SIDES}
    return [(f"How many things are at the {side}?", str(count)) for side, count in counts.items()]


def ask_which_bigger(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Which is bigger, the red star or the blue circle?"""
    candidates = []
    for one, phrase, other, other_phrase in pairs(scene, rng):
        for word, size in (("bigger", "large"), ("smaller", "small")):
            fits = [one.size == size != other.size, other.size == size != one.size]
            candidates.append(
                (f"Which is {word}, the {phrase} or the {other_phrase}?", pick((phrase, other_phrase), fits))
            )
    return candidates


def ask_further(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Which is further left, the red star or the blue circle?"""
    candidates = []
    for one, phrase, other, other_phrase in pairs(scene, rng):
        for word, offset in (
            ("further left", other.x - one.x),
            ("further right", one.x - other.x),
            ("higher", other.y - one.y),
            ("lower", one.y - other.y),
        ):
            if abs(offset) >= RELATION_MARGIN:
                answer = phrase if offset > 0 else other_phrase
                candidates.append((f"Which is {word}, the {phrase} or the {other_phrase}?", answer))
    return candidates


NEW_FORMS: dict[str, tuple[Form, ...]] = {
    "count": (ask_total, ask_count_at),
    "relation": (ask_further,),
    "compare": (ask_which_bigger,),
}
