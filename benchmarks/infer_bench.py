"""Shared parts of the batch inference benchmarks: a model with random weights, images, questions, a timed run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.questions import Question
from llava.inference.distributed import DistributedRank
from llava.inference.engine.image_loader import ImageLoader
from llava.inference.session import Sampling, Session
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import VIT_L_14_336
from llava.tokenization.llama_tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "benchmarks" / "vqa_sample.json"
TOKENIZER = REPOSITORY / "tests" / "data" / "goldens" / "llava-v1.5-golden"
ANSWER_TOKENS, CAPTION_TOKENS = 3, 128
SPREAD = 0.02
CAPTION_PROMPT = "Describe the image in detail."
NOISE = 64  # standard deviation of a pixel's value
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
}


class Bench:
    """Options, images on disk and our model, which all parts share.

    Args:
        options: of the command line.
        device: where everything runs.
        folder: holds the images; answers are written there.
        ranks: this process among those that share the work.
    """

    def __init__(
        self, options: argparse.Namespace, device: torch.device, folder: Path, ranks: DistributedRank | None = None
    ) -> None:
        self.options, self.device, self.folder, self.ranks = options, device, folder, ranks or DistributedRank()
        self.compile_mode = options.compile or ("on" if device.type == "cuda" else "off")
        self.texts = json.loads(SAMPLE.read_text(encoding="utf-8"))["images"]
        self.config = model_config(options.tiny)
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """Our model with random weights, made on the device; the first use is slow."""
        if self._session is None:
            start = time.perf_counter()
            self._session = build_session(self.config, self.device)
            print(f"built our model in {time.perf_counter() - start:.1f} s", flush=True)
        return self._session

    def free_session(self) -> None:
        """Free the memory of our model."""
        self._session = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def questions(self, n_images: int) -> list[Question]:
        """Return the sample's questions about `n_images` images, image by image."""
        rows = [(number, text) for number in range(n_images) for text in self.texts[number % len(self.texts)]]
        return [Question(key, text, (image_name(number),)) for key, (number, text) in enumerate(rows)]

    def single_questions(self, n_images: int) -> list[Question]:
        """Return the first question about each image."""
        return [
            Question(number, self.texts[number % len(self.texts)][0], (image_name(number),))
            for number in range(n_images)
        ]

    def captions(self, n_images: int) -> list[Question]:
        """Return a request for a caption of each image."""
        return [Question(number, CAPTION_PROMPT, (image_name(number),)) for number in range(n_images)]

    def answer(
        self, questions: Sequence[Question], new_tokens: int, wait: Callable[[], None] = lambda: None, **more: Any
    ) -> float:
        """Answer questions into a file on disk and return the seconds.

        Args:
            questions: of all processes.
            new_tokens: of an answer.
            wait: returns when all processes have called it.
            more: options of `answer_batch`.
        """
        path, session = self.folder / "answers.jsonl", self.session
        rank, world_size, _ = self.ranks
        wait()
        start = time.perf_counter()
        with AnswersFile(
            path, questions, {"benchmark": True}, overwrite=True, rank=rank, world_size=world_size
        ) as answers:
            wait()
            answers.begin()
            rows = answer_batch(
                session,
                questions,
                self.folder,
                Sampling(max_new_tokens=new_tokens),
                compile_mode=self.compile_mode,
                workers=self.options.workers,
                rank=rank,
                world_size=world_size,
                **more,
            )
            with contextlib.closing(rows):
                for answer in rows:
                    if answer.error:
                        raise RuntimeError(f"{answer.error}: {answer.message}")
                    answers.write(answer, "random")
            wait()
            if rank == 0:
                answers.finish()
        return time.perf_counter() - start


def model_config(is_tiny: bool) -> LlavaConfig:
    """Return LLaVA-1.5-7B's sizes, or tiny ones."""
    vision = {**VIT_L_14_336, **(TINY_VISION if is_tiny else {})}
    return LlavaConfig(
        **(TINY_TEXT if is_tiny else {}),
        max_position_embeddings=4096,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        mm_vision_config=vision,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
        conversation_template=DEFAULT_TEMPLATE,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, end_id: int) -> None:
    """Give a model random weights, of which none ends an answer."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(std=SPREAD)
    model.get_output_embeddings().weight[end_id] = 0  # logit 0, far below the largest of 32,000


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Make models on a device, in bf16 if it is a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_session(config: LlavaConfig, device: torch.device) -> Session:
    """Return a session around random weights."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    with made_on(device):
        model = LlavaLlamaForCausalLM(config).eval()
    fill(model, tokenizer.eos_token_id)
    processor = CLIPPixels(config.mm_vision_config["image_size"])
    return Session(tokenizer, model, processor, get_template(DEFAULT_TEMPLATE), config.max_position_embeddings)


def image_size(is_tiny: bool) -> tuple[int, int]:
    """Return width and height of the images."""
    return (64, 48) if is_tiny else (640, 480)


def image_name(number: int) -> str:
    """Return the file name of an image."""
    return f"{number:06d}.jpg"


def draw_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write distinct noise as JPEG, on all cores; call it before CUDA is used, since processes are forked."""
    paths = [folder / image_name(number) for number in range(count)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for _ in pool.map(draw_image, paths, range(count), itertools.repeat(size), chunksize=16):
            pass


def draw_image(path: Path, seed: int, size: tuple[int, int]) -> None:
    """Write one image of normal noise, whose pixels follow from the seed."""
    width, height = size
    noise = np.random.default_rng(seed).normal(128, NOISE, (height, width, 3))
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def image_reader(bench: Bench) -> ImageLoader:
    """Return the reader that turns our image files into pixels."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    return ImageLoader(bench.folder, bench.session.image_processor, SimpleNamespace(image_aspect_ratio="pad"), dtype)


def synchronize(device: torch.device) -> None:
    """Wait for the work given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> str:
    """Return device and versions in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in ("torch", "transformers"))
    return f"{name}, {versions}"
