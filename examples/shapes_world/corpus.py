"""Scenes and their questions as arrays, ready for training: images in bytes, questions as rows of token ids.

Many questions are asked about one image. They share the image prefix, and each sees only the prefix
and itself, so a packed row computes exactly what its questions would compute one by one, at a fraction of the cost.
"""

from __future__ import annotations

import io
import multiprocessing
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from drawing import draw_scene, encode_jpeg
from PIL import Image
from questions import Question, ask
from scenes import CANVAS, sample_scene
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.supervision import encode_example
from llava.tokenization.llama_tokenizer import LlavaTokenizer

TEMPLATE = "v1"
CHUNK = 500  # scenes; each chunk has its own seed, so the number of processes changes nothing


@dataclass(frozen=True)
class Slots:
    """The places for questions in a packed row.

    Attributes:
        kinds: the kind of question of each slot.
        lengths: tokens of each slot; a question that is longer leaves its slot empty.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Corpus:
    """Packed rows, one per scene.

    Attributes:
        pixels: (N, side, side, 3) uint8.
        input_ids: (N, sum of the slots' lengths) int16, 0 where a slot is not filled.
        supervised: same shape, bool; true on answers and their `</s>`.
        questions: per scene, one per slot; None where the scene allowed none.
        slots: what is where.
    """

    pixels: np.ndarray
    input_ids: np.ndarray
    supervised: np.ndarray
    questions: list[list[Question | None]]
    slots: Slots


def build_corpus(seed: int, scenes: int, slots: Slots, tokenizer_file: Path, processes: int) -> Corpus:
    """Draw scenes and ask about them, in several processes.

    Args:
        seed: scenes of different seeds are different.
        scenes: how many.
        slots: what to ask about each.
        tokenizer_file: path of `tokenizer.model`.
        processes: how many to use; the result does not depend on it.
    """
    jobs = [(f"{seed}/{start}", min(CHUNK, scenes - start)) for start in range(0, scenes, CHUNK)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.starmap(partial(_build_chunk, slots=slots, tokenizer_file=tokenizer_file), jobs, chunksize=1)
    pixels, input_ids, supervised = (np.concatenate([part[index] for part in parts]) for index in range(3))
    return Corpus(pixels, input_ids, supervised, [row for part in parts for row in part[3]], slots)


def _build_chunk(
    seed: str, scenes: int, slots: Slots, tokenizer_file: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[Question | None]]]:
    """A part of `build_corpus`."""
    rng, tally = random.Random(seed), Counter()
    tokenizer = make_tokenizer(tokenizer_file)
    pixels = np.zeros((scenes, CANVAS, CANVAS, 3), np.uint8)
    input_ids = np.zeros((scenes, sum(slots.lengths)), np.int16)
    supervised = np.zeros(input_ids.shape, bool)
    asked = []
    for index in range(scenes):
        scene = sample_scene(rng)
        jpeg = encode_jpeg(draw_scene(scene), scene.jpeg_quality)
        pixels[index] = np.asarray(Image.open(io.BytesIO(jpeg)))
        asked.append([ask(kind, scene, rng, tally) for kind in slots.kinds])
        start = 0
        for question, length in zip(asked[-1], slots.lengths, strict=True):
            ids, labels = encode_question(question, tokenizer)[1:] if question else ([], [])
            if len(ids) <= length:
                input_ids[index, start : start + len(ids)] = ids
                supervised[index, start : start + len(ids)] = [label != IGNORE_INDEX for label in labels]
            start += length
    return pixels, input_ids, supervised, asked


def encode_question(question: Question, tokenizer: LlavaTokenizer) -> tuple[list[int], list[int], list[int]]:
    """Encode a question about an image as training does.

    Returns:
        ids before the image, ids after it, labels after it.
    """
    turns = [
        {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{question.text}"},
        {"from": "gpt", "value": question.answer},
    ]
    input_ids, labels = encode_example(turns, TEMPLATE, tokenizer)
    place = input_ids.index(IMAGE_TOKEN_INDEX)
    return input_ids[:place], input_ids[place + 1 :], labels[place + 1 :]


def make_tokenizer(file: Path) -> LlavaTokenizer:
    """The tokenizer of `tokenizer.model`, with Vicuna's settings."""
    return LlavaTokenizer(str(file), legacy=False, pad_token="<unk>", model_max_length=2048, padding_side="right")


def packed_layout(prefix: int, patches: int, slots: Slots) -> tuple[Tensor, Tensor]:
    """Who sees whom in a packed row, and at which position each token believes to stand.

    Args:
        prefix: tokens before the image.
        patches: tokens of the image.
        slots: what follows.

    Returns:
        mask (1, 1, S, S), true where the row's token sees the column's; position_ids (1, S).
    """
    shared = prefix + patches
    owner = torch.cat([torch.full((length,), index) for index, length in enumerate((shared, *slots.lengths))])  # (S,)
    positions = [torch.arange(shared)] + [shared + torch.arange(length) for length in slots.lengths]
    causal = torch.ones(len(owner), len(owner)).tril().bool()
    visible = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    return (causal & visible)[None, None], torch.cat(positions)[None]
