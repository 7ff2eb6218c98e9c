"""Phrases for the things of a scene, and what every form of question needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from scenes import COLORS, COLUMNS, ROWS, SHAPES, SIZES, Scene, Thing

Candidate = tuple[str, str]  # question text, answer
Form = Callable[[Scene, random.Random], list[Candidate]]  # every question of one wording that a scene allows
SIDES = ("top", "bottom", "left", "right")  # "middle" would name both a row and a column


@dataclass(frozen=True)
class Description:
    """A phrase that things may fit, such as "large red star"; None leaves an attribute open."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the phrase is true of a thing."""
        return (
            self.size in (None, thing.size) and self.color in (None, thing.color) and self.shape in (None, thing.shape)
        )

    def phrase(self) -> str:
        """The phrase in the singular, without an article."""
        return " ".join(word for word in (self.size, self.color, self.shape or "thing") if word)

    def plural(self) -> str:
        """The phrase in the plural."""
        return self.phrase() + "s"

    def specificity(self) -> int:
        """How many attributes the phrase names."""
        return 3 - (self.size, self.color, self.shape).count(None)


DESCRIPTIONS = tuple(
    Description(size, color, shape)
    for size, color, shape in product((None, *SIZES), (None, *COLORS), (None, *SHAPES))
    if size or color or shape
)


def count_fitting(scene: Scene, description: Description) -> int:
    """How many things of a scene fit a description."""
    return sum(description.fits(thing) for thing in scene.things)


def is_at(thing: Thing, side: str) -> bool:
    """Whether a thing is in the row or column that a side of the image names."""
    return side in (ROWS[thing.row], COLUMNS[thing.column])


def unique_descriptions(scene: Scene, thing: Thing, without: Sequence[str] = ()) -> list[Description]:
    """The descriptions of at most two attributes that fit this thing and no other.

    Args:
        scene: where the thing is.
        thing: one of the scene's things.
        without: attributes ("size", "color", "shape") that the description must not name.
    """
    names = ("size", "color", "shape")
    choices = [(None,) if name in without else (None, getattr(thing, name)) for name in names]
    found = (Description(size, color, shape) for size, color, shape in product(*choices))
    return [d for d in found if 1 <= d.specificity() <= 2 and count_fitting(scene, d) == 1]


def named(scene: Scene, rng: random.Random, without: Sequence[str] = ()) -> list[tuple[Thing, str]]:
    """Each thing that a phrase identifies, with one such phrase."""
    found = ((thing, unique_descriptions(scene, thing, without)) for thing in scene.things)
    return [(thing, rng.choice(descriptions).phrase()) for thing, descriptions in found if descriptions]


def pointed(scene: Scene, rng: random.Random, without: Sequence[str] = ()) -> list[tuple[Thing, str]]:
    """As `named`, and each thing also by its place."""
    return named(scene, rng, without) + [(thing, f"thing at the {thing.place}") for thing in scene.things]


def pairs(scene: Scene, rng: random.Random, without: Sequence[str] = ()) -> Iterator[tuple[Thing, str, Thing, str]]:
    """Every ordered pair of different things, with a phrase that identifies each."""
    for (one, phrase), (other, other_phrase) in permutations(named(scene, rng, ["size", *without]), 2):
        yield one, phrase, other, other_phrase


def pick(phrases: tuple[str, str], fits: Sequence[bool]) -> str:
    """The phrase of the one thing that fits, or "both" or "neither"."""
    return {(True, True): "both", (False, False): "neither"}.get(tuple(fits), phrases[not fits[0]])


def yes_no(truth: bool) -> str:
    """The answer to a closed question."""
    return "yes" if truth else "no"
