#!/usr/bin/env python3
"""Add a LoRA adapter (or a projector) to its base and write one complete checkpoint.

Example:
    python scripts/merge_lora_weights.py --model-path checkpoints/llava-v1.5-7b-task-lora \\
        --model-base liuhaotian/llava-v1.5-7b --save-model-path llava_merged_model
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from llava.constants import DEFAULT_TEMPLATE
from llava.files import atomic_directory
from llava.inference.parity import Probe, compare_probes, probe_model
from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint import Checkpoint, Layout, open_checkpoint, save_checkpoint
from llava.model.devices import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; return the exit code."""
    options = parse_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        merge(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="directory of the LoRA adapter or projector")
    parser.add_argument("--model-base", help="directory or hub id of its base (default: the one recorded there)")
    parser.add_argument("--save-model-path", required=True, type=Path, help="directory to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights (default: the base's)")
    parser.add_argument("--vision-tower", help="image encoder, for a base that comes without one")
    parser.add_argument("--allow-other-base", action="store_true", help="accept a base the adapter was not trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that is already there")
    parser.add_argument("--no-parity", action="store_true", help="don't compare adapter and merged model afterwards")
    parser.add_argument("--device", help="where the comparison runs (default: the best there is)")
    return parser.parse_args(argv)


def merge(options: argparse.Namespace) -> None:
    """Write the merged directory, then measure how far it differs from base and adapter.

    Raises:
        FileExistsError: if the directory is there already.
        ValueError: if the model path holds full weights, or the base is another one.
    """
    places = {"vision_tower": options.vision_tower, "allow_other_base": options.allow_other_base}
    checkpoint = open_checkpoint(options.model_path, options.model_base, **places)
    if checkpoint.layout is Layout.FULL:
        raise ValueError(f"--model-path {options.model_path} holds full weights: there is nothing to merge")
    checkpoint.config.conversation_template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
    dtype = DTYPES[options.dtype] if options.dtype else checkpoint.tensors["model.embed_tokens.weight"].dtype
    with atomic_directory(options.save_model_path, replace=options.overwrite) as directory:
        write_merged(checkpoint, directory, dtype)
    print(f"wrote {options.save_model_path} in {str(dtype).removeprefix('torch.')}")
    if not options.no_parity:
        print(measure_parity(options, checkpoint.layout))


def write_merged(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype) -> None:
    """Write a complete checkpoint, tensor by tensor, with a progress bar."""
    with tqdm(total=len(checkpoint.tensors), unit="tensor", desc="merging") as bar:
        save_checkpoint(
            checkpoint.tensors,
            checkpoint.config,
            checkpoint.tokenizer,
            checkpoint.image_processor,
            directory,
            dtype=dtype,
            progress=lambda _: bar.update(),
        )


def measure_parity(options: argparse.Namespace, layout: Layout) -> str:
    """Return in words how far the written model differs from base and adapter side by side."""
    is_lora = layout is Layout.LORA
    separate = open_checkpoint(
        options.model_path,
        options.model_base,
        vision_tower=options.vision_tower,
        allow_other_base=options.allow_other_base,
        with_adapter=not is_lora,
    )
    before = _probe(separate, options.device, options.model_path if is_lora else None)
    after = _probe(open_checkpoint(options.save_model_path), options.device, None)
    parity = compare_probes(before, after)
    return (
        f"parity of {layout.value} and merged model on {len(before)} questions: largest logit difference "
        f"{parity.logit_difference:.2g} (largest logit {parity.logit_scale:.3g}), equal greedy answers "
        f"{100 * parity.greedy_agreement:.0f} %"
    )


def _probe(checkpoint: Checkpoint, device: str | None, adapter: str | None) -> list[Probe]:
    model = build_model(checkpoint, device=device).eval()
    asked = attach_adapter(model, adapter) if adapter else model
    return probe_model(asked, checkpoint.tokenizer, checkpoint.config.conversation_template)


if __name__ == "__main__":
    sys.exit(main())
