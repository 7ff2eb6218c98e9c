#!/usr/bin/env python3
"""Write LLaVA-1.5-7B at its true sizes with random weights, for measurements where the real ones can't be had.

Example: python benchmarks/random_checkpoint.py --output /tmp/random-7b --tokenizer playground/llava-tiny
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import accelerate
import torch
from torch import Tensor
from tqdm import tqdm

from llava.constants import DEFAULT_TEMPLATE
from llava.files import atomic_directory
from llava.image_processing import CLIPPixels
from llava.model.checkpoint import TOWER_PREFIX, file_name, save_checkpoint
from llava.model.configuration import LlavaConfig
from llava.model.devices import best_device
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import VIT_L_14_336
from llava.model.weights import LazyTensors
from llava.tokenization import load_tokenizer

STANDARD_DEVIATION = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """Write the directory that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--tokenizer", required=True, type=Path, help="directory whose tokenizer is used")
    parser.add_argument("--layers", type=int, default=32, help="LLM layers (default: %(default)s, as 7B)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    config = LlavaConfig(
        num_hidden_layers=options.layers,
        max_position_embeddings=4096,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        mm_vision_config=VIT_L_14_336,
        mm_hidden_size=VIT_L_14_336["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
        conversation_template=DEFAULT_TEMPLATE,
    )
    tensors = random_tensors(config, options.seed)
    tokenizer = load_tokenizer(options.tokenizer)
    with atomic_directory(options.output) as directory, tqdm(total=len(tensors), unit="tensor") as bar:
        processor = CLIPPixels(VIT_L_14_336["image_size"])
        save_checkpoint(
            tensors, config, tokenizer, processor, directory, dtype=torch.bfloat16, progress=lambda _: bar.update()
        )
    print(f"wrote {options.output}")
    return 0


def random_tensors(config: LlavaConfig, seed: int) -> LazyTensors:
    """Return every tensor of a released checkpoint: norms 1, the rest normal, made on the GPU."""
    torch.manual_seed(seed)
    with accelerate.init_empty_weights():
        model = LlavaLlamaForCausalLM(config)
    shapes = {file_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    last = config.mm_vision_config["num_hidden_layers"] - 1
    layers = f"{TOWER_PREFIX}vision_model.encoder.layers."
    shapes |= {
        name.replace(f"{layers}0.", f"{layers}{last}."): shape
        for name, shape in shapes.items()
        if name.startswith(f"{layers}0.")
    }
    return LazyTensors({name: functools.partial(_random_tensor, name, shape) for name, shape in shapes.items()})


def _random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    return torch.randn(shape, device=best_device(), dtype=torch.bfloat16) * STANDARD_DEVIATION


if __name__ == "__main__":
    sys.exit(main())
