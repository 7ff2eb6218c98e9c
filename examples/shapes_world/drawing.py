"""Scenes of the shapes world, painted with Pillow and written as JPEG; nothing depends on more than its arguments."""

from __future__ import annotations

import colorsys
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw
from scenes import CANVAS, Scene, Thing, sample_background

SUPERSAMPLING = 2  # scenes are painted larger and averaged down, which smooths the edges


def draw_scene(scene: Scene, canvas: int = CANVAS) -> Image.Image:
    """Paint a scene: gradient, scratches and specks, the things, then noise.

    Args:
        scene: what to paint.
        canvas: side of the image in pixels; the scene's coordinates are scaled to it.

    Returns:
        an RGB image of `canvas` x `canvas` pixels.
    """
    scale = canvas / CANVAS * SUPERSAMPLING
    clutter = random.Random(scene.clutter_seed)
    image = _draw_gradient(scene, canvas * SUPERSAMPLING)
    pen = ImageDraw.Draw(image)
    _draw_clutter(pen, clutter, canvas * SUPERSAMPLING, scale)
    for thing in scene.things:
        _draw_thing(pen, thing, clutter, scale)
    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    grain = np.random.default_rng(scene.clutter_seed).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels + scene.noise * grain).clip(0, 255).astype(np.uint8))


def _draw_gradient(scene: Scene, side: int) -> Image.Image:
    """The background, from the sky's colour above to the ground's below."""
    mix = np.linspace(0.0, 1.0, side, dtype=np.float32)[:, None, None]
    column = np.array(scene.sky, np.float32) * (1 - mix) + np.array(scene.ground, np.float32) * mix  # (side, 1, 3)
    return Image.fromarray(np.broadcast_to(column, (side, side, 3)).astype(np.uint8))


def _draw_clutter(pen: ImageDraw.ImageDraw, rng: random.Random, side: int, scale: float) -> None:
    """Specks of any colour and dull scratches: too small or too thin to be things."""
    for _ in range(rng.randint(4, 14)):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.5, 1.6) * scale
        fill = tuple(rng.randint(0, 255) for _ in range(3))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.uniform(0, side) for _ in range(4)]
        pen.line(ends, fill=sample_background(rng), width=round(scale))


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, rng: random.Random, scale: float) -> None:
    """One thing with a darker outline; its corners are a little off."""
    fill = _rgb(thing.hsv, 1.0)
    outline = _rgb(thing.hsv, rng.uniform(0.5, 0.9))
    width = max(1, round(scale * rng.uniform(0.5, 1.5)))
    if thing.shape == "circle":
        stretch = rng.uniform(0.93, 1.0)
        half_width, half_height = thing.radius * scale, thing.radius * scale * stretch
        x, y = thing.x * scale, thing.y * scale
        pen.ellipse((x - half_width, y - half_height, x + half_width, y + half_height), fill, outline, width)
        return
    jitter = 0.04 * thing.radius
    corners = [
        ((x + rng.uniform(-jitter, jitter)) * scale, (y + rng.uniform(-jitter, jitter)) * scale)
        for x, y in outline_corners(thing)
    ]
    pen.polygon(corners, fill, outline, width)


def outline_corners(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a square, triangle or star in pixels, clockwise; a circle has none."""
    spokes = {"square": [1.0] * 4, "triangle": [1.0] * 3, "star": [1.0, 0.42] * 5, "circle": []}[thing.shape]
    start = thing.angle - (45.0 if thing.shape == "square" else 90.0)
    turns = [math.radians(start + 360.0 * index / len(spokes)) for index in range(len(spokes))]
    return [
        (thing.x + thing.radius * spoke * math.cos(turn), thing.y + thing.radius * spoke * math.sin(turn))
        for spoke, turn in zip(spokes, turns, strict=True)
    ]


def _rgb(hsv: tuple[float, float, float], brightness: float) -> tuple[int, int, int]:
    """RGB in 0..255 of a colour, darkened by `brightness` in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hsv[0], hsv[1], hsv[2] * brightness)
    return round(red * 255), round(green * 255), round(blue * 255)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an image as JPEG; deterministic for one version of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
