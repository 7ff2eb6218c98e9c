"""A training workload like the VQA table's, at LLaVA-1.5-7B's true sizes, made on the machine: no weights, no data set.

Questions per image and lengths are those of a sample of the table (`vqa_lengths.json`, VQAv2, CC BY 4.0); words and
weights are random, images are noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.records import EncodedRecord
from llava.model.configuration import LlavaConfig
from llava.model.memory import ModelSizes
from llava.model.packed.forward import PackedLlavaForCausalLM
from llava.model.vision_tower import VIT_L_14_336

LENGTHS = Path(__file__).parent / "vqa_lengths.json"
IMAGE_SIZE = (640, 480)
SYSTEM_TOKENS = 34
"""Tokens before the image, including the first."""
LLAMA_MORE = 2
"""Added to every question, at least what Llama's tokenizer adds on average to the sample's counts."""
STANDARD_DEVIATION = 0.02
TOWER_FLOPS, PROJECTOR_FLOPS = 0.37e12, 0.024e12
"""Of an image's forward pass, at true sizes."""


def counted_flops(sizes: ModelSizes, rank: int, positions: float, images: float) -> float:
    """Return the floating-point operations of a training step under LoRA, without attention and padding.

    At a position a frozen weight counts 4 (forward, and backward to the activations), a trainable one 6; the vision
    tower counts its forward pass only.

    Args:
        sizes: of the model.
        rank: of the adapters.
        positions: of the LLM in the step.
        images: that are encoded.
    """
    llm = positions * (4 * sizes.block_weights + 6 * sizes.lora_parameters(rank))
    return llm + images * (TOWER_FLOPS + 3 * PROJECTOR_FLOPS)


def table_questions() -> list[list[tuple[int, int]]]:
    """Return for each image and question the tokens between image and answer, and those of the answer."""
    images = json.loads(LENGTHS.read_text(encoding="utf-8"))["questions"]
    return [[(question + LLAMA_MORE, answer) for question, answer in image] for image in images]


def write_images(directory: Path, count: int, size: tuple[int, int] = IMAGE_SIZE) -> list[Path]:
    """Write JPEG files of noise, smoothed a little so that they compress about as photographs do."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{index:06d}.jpg" for index in range(count)]

    def write(path: Path) -> None:
        if not path.exists():
            generator = numpy.random.default_rng(int(path.name.removesuffix(".jpg")))
            noise = generator.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=numpy.uint8)
            hidden = path.with_name(f".{os.getpid()}_{path.name}")  # several processes may write the same
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(hidden, quality=90)
            hidden.replace(path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, paths))
    return paths


def make_records(
    questions: Sequence[Sequence[tuple[int, int]]], images: Sequence[Path], vocabulary: int
) -> list[EncodedRecord]:
    """Return a record for every question, with random words.

    Args:
        questions: of each image, (tokens between image and answer, tokens of the answer).
        images: one for each.
        vocabulary: ids are below it.
    """
    generator = numpy.random.default_rng(0)
    system = [1, *generator.integers(3, vocabulary, SYSTEM_TOKENS - 1).tolist()]
    records = []
    for path, asked in zip(images, questions, strict=True):
        for question, answer in asked:
            words = generator.integers(3, vocabulary, question + answer).tolist()
            words[-1] = 2
            ids = [*system, IMAGE_TOKEN_INDEX, *words]
            records.append(EncodedRecord(ids, [IGNORE_INDEX] * (len(ids) - answer) + ids[-answer:], [path]))
    return records


def model_config(*, tiny: bool) -> LlavaConfig:
    """Return the config of LLaVA-1.5-7B, or of something small of the same kind."""
    vision = dict(VIT_L_14_336)
    sizes = {"max_position_embeddings": 4096}
    if tiny:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 56}
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 512}
    return LlavaConfig(
        pad_token_id=0,
        rms_norm_eps=1e-5,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        mm_vision_config=vision,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
        use_cache=False,
        **sizes,
    )


@torch.no_grad()
def random_model(
    config: LlavaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PackedLlavaForCausalLM:
    """Return a model with random weights, made on its device; norms are 1."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = PackedLlavaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    fill(model)
    # Buffers, which are computed and not random, come from a model with little else.
    vision = {**config.mm_vision_config, "num_hidden_layers": 2}
    small = type(config).from_dict(
        config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8, "mm_vision_config": vision}
    )
    buffers = dict(PackedLlavaForCausalLM(small).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Give every parameter random values, norms 1 and biases 0."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "layrnorm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=STANDARD_DEVIATION)
