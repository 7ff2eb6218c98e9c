"""Questions the base model is trained on: the old kinds, and captions that are not scored."""

from __future__ import annotations

import random
from collections.abc import Sequence

from phrases import (
    DESCRIPTIONS,
    SIDES,
    Candidate,
    Description,
    Form,
    count_fitting,
    is_at,
    named,
    pairs,
    pick,
    pointed,
    yes_no,
)
from scenes import COLORS, PLACES, SHAPES, SIZES, Scene, Thing

WORDS = (
    *COLORS, *SHAPES, *SIZES, *(word for place in PLACES for word in place.split()), *"0123456789", "yes", "no", "none",
    "how", "many", "what", "which", "where", "is", "are", "there", "the", "a", "of", "or", "and", "than", "same",
    "more", "bigger", "smaller", "higher", "lower", "further", "neither", "both",
)  # fmt: skip


def ask_color(scene: Scene, rng: random.Random) -> list[Candidate]:
    """What color is the large star?"""
    return [(f"What color is the {phrase}?", thing.color) for thing, phrase in pointed(scene, rng, ["color"])]


def ask_shape(scene: Scene, rng: random.Random) -> list[Candidate]:
    """What shape is the red thing?"""
    return [(f"What shape is the {phrase}?", thing.shape) for thing, phrase in pointed(scene, rng, ["shape"])]


def ask_size(scene: Scene, rng: random.Random) -> list[Candidate]:
    """What size is the red star?"""
    return [(f"What size is the {phrase}?", thing.size) for thing, phrase in pointed(scene, rng, ["size"])]


def ask_size_choice(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is the red star small or large?"""
    return [(f"Is the {phrase} small or large?", thing.size) for thing, phrase in pointed(scene, rng, ["size"])]


def ask_place(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Where is the red star?"""
    return [(f"Where is the {phrase}?", thing.place) for thing, phrase in named(scene, rng)]


def ask_exists(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is there a red star?"""
    specificity = rng.choice((1, 2, 2, 3))
    asked = [d for d in DESCRIPTIONS if d.specificity() == specificity]
    return [(f"Is there a {d.phrase()}?", yes_no(count_fitting(scene, d) > 0)) for d in asked]


def ask_both_exist(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is there a red star and a blue circle?"""
    candidates = []
    for _ in range(12):
        pair = [rng.choice(_attributes_of(scene, rng)) for _ in range(2)]
        if pair[0] == pair[1]:
            continue
        answer = yes_no(all(count_fitting(scene, d) for d in pair))
        candidates.append((f"Is there a {pair[0].phrase()} and a {pair[1].phrase()}?", answer))
    return candidates


def ask_exists_at(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is there a thing at the top left?"""
    taken = {thing.place for thing in scene.things}
    return [(f"Is there a thing at the {place}?", yes_no(place in taken)) for place in PLACES]


def ask_attribute(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is the star red? Is the red thing large? Is the small thing a circle?"""
    candidates = []
    for name, values in (("color", COLORS), ("size", SIZES), ("shape", SHAPES)):
        for thing, phrase in pointed(scene, rng, [name]):
            truth = getattr(thing, name)
            for value in (truth, rng.choice([v for v in values if v != truth])):
                wording = f"a {value}" if name == "shape" else value
                candidates.append((f"Is the {phrase} {wording}?", yes_no(value == truth)))
    return candidates


def _attributes_of(scene: Scene, rng: random.Random) -> list[Description]:
    """A phrase that is true of something and one mixed from two things, which may be true of nothing."""
    one, other = rng.choice(scene.things), rng.choice(scene.things)
    mixed = Description(None, one.color, rng.choice((other.shape, rng.choice(SHAPES))))
    return [Description(None, one.color, one.shape), mixed]


def ask_both_attribute(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is the star large and the circle small? Is the star red and the circle blue?"""
    candidates = []
    for name, values in (("size", SIZES), ("color", COLORS)):
        for one, phrase, other, other_phrase in pairs(scene, rng, [name]):
            truth, other_truth = getattr(one, name), getattr(other, name)
            for word, other_word in _sometimes_false((truth, other_truth), values, rng):
                answer = yes_no((word, other_word) == (truth, other_truth))
                candidates.append((f"Is the {phrase} {word} and the {other_phrase} {other_word}?", answer))
    return candidates


def ask_both_at(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is the star at the left and the circle at the top?"""
    candidates = []
    for one, phrase, other, other_phrase in pairs(scene, rng):
        for _ in range(2):
            side, other_side = rng.choice(SIDES), rng.choice(SIDES)
            answer = yes_no(is_at(one, side) and is_at(other, other_side))
            candidates.append((f"Is the {phrase} at the {side} and the {other_phrase} at the {other_side}?", answer))
    return candidates


def _sometimes_false(truth: tuple[str, str], values: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """The true pair of words and one that is wrong in one or in both."""
    wrong = [rng.choice([v for v in values if v != word]) for word in truth]
    return [truth, rng.choice([(wrong[0], truth[1]), (truth[0], wrong[1]), (wrong[0], wrong[1])])]


def ask_which(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Which is large, the star or the circle? Which is at the top, the star or the circle?"""
    candidates = []
    for one, phrase, other, other_phrase in pairs(scene, rng):
        things, phrases = (one, other), (phrase, other_phrase)
        for side in SIDES:
            answer = pick(phrases, [is_at(thing, side) for thing in things])
            candidates.append((f"Which is at the {side}, the {phrase} or the {other_phrase}?", answer))
        for size in SIZES:
            answer = pick(phrases, [thing.size == size for thing in things])
            candidates.append((f"Which is {size}, the {phrase} or the {other_phrase}?", answer))
    for one, phrase, other, other_phrase in pairs(scene, rng, ["color"]):
        color = rng.choice((one.color, other.color, rng.choice(COLORS)))
        answer = pick((phrase, other_phrase), [thing.color == color for thing in (one, other)])
        candidates.append((f"Which is {color}, the {phrase} or the {other_phrase}?", answer))
    return candidates


def ask_side_of_image(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Is the star at the left?"""
    return [
        (f"Is the {phrase} at the {side}?", yes_no(is_at(thing, side)))
        for thing, phrase in named(scene, rng)
        for side in SIDES
    ]


def describe_image(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Describe the image."""
    phrases = (f"{thing.size} {thing.color} {thing.shape} {thing.place}" for thing in reading_order(scene))
    return [("Describe the picture.", ", ".join(phrases))]  # the prompt that playground/llava-tiny was trained on


def name_things(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Name the red things. What colors are the circles?"""
    candidates = []
    for d in (d for d in DESCRIPTIONS if d.specificity() == 1):
        fitting = [thing for thing in reading_order(scene) if d.fits(thing)]
        if d.shape:
            candidates.append((f"What colors are the {d.plural()}?", ", ".join(t.color for t in fitting) or "none"))
        else:
            candidates.append((f"Name the {d.plural()}.", ", ".join(t.shape for t in fitting) or "none"))
    return candidates


def all_or_some(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Are all, some or none of the circles red?"""
    candidates = []
    for group in (Description(shape=shape) for shape in SHAPES):
        things = [thing for thing in scene.things if group.fits(thing)]
        if len(things) >= 2:
            for word in {*(thing.color for thing in things), rng.choice(COLORS), *SIZES}:
                hits = sum(word in (thing.color, thing.size) for thing in things)
                answer = "none" if hits == 0 else "all" if hits == len(things) else "some"
                candidates.append((f"Are all, some or none of the {group.plural()} {word}?", answer))
    return sorted(candidates)


def repeat_words(scene: Scene, rng: random.Random) -> list[Candidate]:
    """Say bigger. (Keeps every word alive in the language model, whatever the image shows.)"""
    words = " ".join(rng.sample(WORDS, rng.choice((1, 1, 2, 3))))
    return [(f"Say {words}.", words)]


def reading_order(scene: Scene) -> list[Thing]:
    """The things row by row, each row from the left."""
    return sorted(scene.things, key=lambda thing: (thing.row, thing.column))


OLD_FORMS: dict[str, tuple[Form, ...]] = {
    "color": (ask_color,),
    "shape": (ask_shape,),
    "size": (ask_size, ask_size_choice),
    "place": (ask_place,),
    "exists": (ask_exists, ask_both_exist, ask_exists_at),
    "attribute": (ask_attribute, ask_side_of_image),
    "both": (ask_both_attribute, ask_both_at),
    "which": (ask_which,),
}
CAPTION_FORMS: dict[str, tuple[Form, ...]] = {
    "caption": (describe_image,),
    "names": (name_things,),
    "share": (all_or_some,),
    "say": (repeat_words,),
}
