#!/usr/bin/env python3
"""Write LLaVA-1.5-7B at its true sizes with random weights, for measurements where the real ones can't be had.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny --lora /tmp/7b-lora
Example, what pretraining starts from: ... --llm-only --output /tmp/vicuna --tower /tmp/clip
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import accelerate
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_TEMPLATE
from llava.files.atomic_files import atomic_directory
from llava.model.adapter.adapter_config import ADAPTER_CONFIG_FILE
from llava.model.adapter.lora import ADAPTER_FILES, is_llm_block
from llava.model.adapter.non_lora import NON_LORA_FILES
from llava.model.adapter.tensor_names import PEFT_PREFIX
from llava.model.checkpoint.checkpoint import save_checkpoint, save_settings
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors, fingerprint
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import save_tensors
from llava.model.configuration import LlavaConfig
from llava.model.devices import best_device
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import TOWER_PREFIX, VIT_L_14_336, released_name
from llava.tokenization.llama_tokenizer import load_tokenizer

STANDARD_DEVIATION = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """Write the directory that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--tokenizer", required=True, type=Path, help="directory whose tokenizer is used")
    parser.add_argument("--layers", type=int, default=32, help="LLM layers (default: %(default)s, as 7B)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lora", type=Path, help="write an adapter on all of the LLM's linear layers too, into this directory"
    )
    parser.add_argument("--rank", type=int, default=128, help="of that adapter (default: %(default)s)")
    parser.add_argument("--llm-only", action="store_true", help="leave vision tower and projector out, as Vicuna does")
    parser.add_argument("--tower", type=Path, help="write a vision tower too, into this directory of its own")
    options = parser.parse_args(argv)
    if options.llm_only and options.lora:
        parser.error("--lora writes a projector too; leave --llm-only out")
    config = llm_config(options.layers) if options.llm_only else llava_config(options.layers)
    tensors = random_tensors(config, options.seed)
    tokenizer, processor = load_tokenizer(options.tokenizer), CLIPPixels(VIT_L_14_336["image_size"])
    with atomic_directory(options.output) as directory, tqdm(total=len(tensors), unit="tensor") as bar:
        save_checkpoint(
            tensors, config, tokenizer, processor, directory, dtype=torch.bfloat16, progress=lambda _: bar.update()
        )
    print(f"wrote {options.output}")
    if options.tower:
        write_tower(options.tower, options.seed)
        print(f"wrote {options.tower}")
    if options.lora:
        config.base_model_name_or_path = str(options.output)
        config.base_model_fingerprint = fingerprint(open_weights(options.output))
        with atomic_directory(options.lora) as directory:
            write_adapter(tensors, config, options.rank, options.seed, directory)
            save_settings(config, tokenizer, processor, directory)
        print(f"wrote {options.lora}")
    return 0


def llm_config(layers: int) -> LlavaConfig:
    """Return the config of Vicuna-1.5-7B with `layers` layers, without vision tower and projector."""
    return LlavaConfig(num_hidden_layers=layers, max_position_embeddings=4096, pad_token_id=0, rms_norm_eps=1e-5)


def llava_config(layers: int) -> LlavaConfig:
    """Return the config of LLaVA-1.5-7B with `layers` layers."""
    config = llm_config(layers)
    config.mm_vision_tower = "openai/clip-vit-large-patch14-336"
    config.mm_vision_config = VIT_L_14_336
    config.mm_hidden_size = VIT_L_14_336["hidden_size"]
    config.mm_projector_type = "mlp2x_gelu"
    config.image_aspect_ratio = "pad"
    config.conversation_template = DEFAULT_TEMPLATE
    return config


def write_tower(directory: Path, seed: int) -> None:
    """Write a CLIP vision tower as `openai/clip-vit-large-patch14-336` is laid out, with its image settings."""
    torch.manual_seed(seed)
    CLIPVisionModel(CLIPVisionConfig(**VIT_L_14_336)).to(torch.bfloat16).save_pretrained(directory)
    CLIPPixels(VIT_L_14_336["image_size"]).save_pretrained(directory)


def write_adapter(base: LazyTensors, config: LlavaConfig, rank: int, seed: int, directory: Path) -> None:
    """Write a LoRA directory's weights, with a projector of its own."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter, projector = {}, {}
    for name, entry in base.entries.items():
        module, _, leaf = name.rpartition(".")
        if is_llm_block(name) and leaf == "weight" and module.rpartition(".")[2] in kinds:
            out, into = entry.shape
            layer = f"{PEFT_PREFIX}{module}"
            for half, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
                adapter[f"{layer}.{half}.weight"] = _random_tensor(f"{layer}.{half}", shape, seed)
        elif "mm_projector" in name:
            projector[PEFT_PREFIX + name] = _random_tensor(PEFT_PREFIX + name, entry.shape, seed)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
    settings |= {"target_modules": list(kinds), "bias": "none", "inference_mode": True}
    settings["base_model_name_or_path"] = config.base_model_name_or_path
    (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_tensors({name: tensor.cpu() for name, tensor in adapter.items()}, directory / ADAPTER_FILES[0])
    save_tensors({name: tensor.cpu() for name, tensor in projector.items()}, directory / NON_LORA_FILES[0])


def random_tensors(config: LlavaConfig, seed: int) -> LazyTensors:
    """Return every tensor of a released checkpoint: norms 1, the rest normal, made on the GPU if there is one."""
    with accelerate.init_empty_weights():
        model = LlavaLlamaForCausalLM(config)
    shapes = {released_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.mm_vision_config:
        last = config.mm_vision_config["num_hidden_layers"] - 1
        layers = f"{TOWER_PREFIX}vision_model.encoder.layers."
        shapes |= {
            name.replace(f"{layers}0.", f"{layers}{last}."): shape
            for name, shape in shapes.items()
            if name.startswith(f"{layers}0.")
        }
    return LazyTensors(
        {
            name: LazyTensor(torch.Size(shape), torch.bfloat16, functools.partial(_random_tensor, name, shape, seed))
            for name, shape in shapes.items()
        }
    )


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a tensor that depends on its name and the seed alone, in whatever order tensors are made."""
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    device = best_device()
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) * STANDARD_DEVIATION


if __name__ == "__main__":
    sys.exit(main())
