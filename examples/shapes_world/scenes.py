"""The shapes world: scenes of coloured shapes, sampled as data; `drawing` paints them.

A scene is a handful of things (shape, colour, size, place) on a cluttered background, in the manner of CLEVR and
Sort-of-CLEVR. `sample_scene` decides the content, from its arguments only.

Source: Johnson et al. 2017 (CLEVR), Santoro et al. 2017 (Sort-of-CLEVR); no code is taken from either.
"""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

CANVAS = 84  # pixels per side
HUES = {"red": 0.0, "orange": 27.0, "yellow": 55.0, "green": 125.0, "blue": 220.0, "purple": 288.0}  # degrees
COLORS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "star")
RADII = {"small": (6.0, 7.2), "large": (10.5, 12.5)}  # pixels, centre to the outermost point
SIZES = tuple(RADII)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")

_HUE_JITTER = 5.0  # degrees either side
_CELL = CANVAS / 3  # pixels
_CELL_MARGIN = 0.5  # pixels between a thing and the border of its cell, so that things never touch


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: one of `SHAPES`.
        color: one of `COLORS`.
        size: one of `SIZES`.
        row: 0, 1 or 2 from the top.
        column: 0, 1 or 2 from the left.
        x: centre, pixels from the left.
        y: centre, pixels from the top.
        radius: pixels, centre to the outermost point.
        angle: degrees.
        hsv: hue, saturation and value, each in 0..1, already jittered.
    """

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    angle: float
    hsv: tuple[float, float, float]

    @property
    def place(self) -> str:
        """Where the thing is, in words: "top left", "center", "middle right" and so on."""
        return place_name(self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """Content of an image.

    Attributes:
        things: in no particular order.
        sky: RGB of the background's upper end, 0..255.
        ground: RGB of the background's lower end, 0..255.
        noise: standard deviation of the pixel noise, in units of 0..255.
        clutter_seed: seed of the specks, scratches and noise.
        jpeg_quality: as Pillow's `quality`.
    """

    things: tuple[Thing, ...]
    sky: tuple[int, int, int]
    ground: tuple[int, int, int]
    noise: float
    clutter_seed: int
    jpeg_quality: int


def place_name(row: int, column: int) -> str:
    """Name a cell of the three-by-three grid: (0, 0) -> "top left", (1, 1) -> "center"."""
    return "center" if row == column == 1 else f"{ROWS[row]} {COLUMNS[column]}"


PLACES = tuple(place_name(row, column) for row in range(3) for column in range(3))


def sample_scene(rng: random.Random, min_things: int = 3, max_things: int = 6) -> Scene:
    """Draw a scene at random.

    Most scenes use a few of the colours and shapes only, so that things often share an attribute.

    Args:
        rng: source of all randomness; the same state gives the same scene.
        min_things: smallest number of things.
        max_things: largest number of things, at most 9.

    Returns:
        a scene whose things lie in different cells of the three-by-three grid.
    """
    colors = rng.sample(COLORS, rng.choice((2, 3, 6)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 4)))
    cells = rng.sample(range(9), rng.randint(min_things, max_things))
    things = tuple(_sample_thing(rng, *divmod(cell, 3), rng.choice(colors), rng.choice(shapes)) for cell in cells)
    sky, ground = sample_background(rng), sample_background(rng)
    return Scene(things, sky, ground, rng.uniform(2.0, 9.0), rng.getrandbits(31), rng.randint(80, 95))


def _sample_thing(rng: random.Random, row: int, column: int, color: str, shape: str) -> Thing:
    """One thing somewhere in a cell, with its colour, turn and size jittered."""
    size = rng.choice(SIZES)
    radius = rng.uniform(*RADII[size])
    x, y = (_sample_coordinate(rng, index, radius) for index in (column, row))
    hue = (HUES[color] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)) % 360 / 360
    hsv = (hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0))
    return Thing(shape, color, size, row, column, x, y, radius, rng.uniform(-20.0, 20.0), hsv)


def _sample_coordinate(rng: random.Random, index: int, radius: float) -> float:
    """A coordinate in pixels that keeps a thing of this radius inside band `index` of three."""
    return rng.uniform(index * _CELL + radius + _CELL_MARGIN, (index + 1) * _CELL - radius - _CELL_MARGIN)


def sample_background(rng: random.Random) -> tuple[int, int, int]:
    """A dull colour, so that no background passes for a thing."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.2), rng.uniform(0.1, 0.9))
    return round(red * 255), round(green * 255), round(blue * 255)
