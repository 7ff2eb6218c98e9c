#!/usr/bin/env python3
"""Measure what the host spends on a step of LoRA training on packs, part by part.

The model has LLaVA-1.5-7B's layers and adapters but tiny widths, so that there is next to nothing to compute: what is
left are Python, PyTorch's dispatch and the launching of kernels.

Example: python benchmarks/host_time.py
         python benchmarks/host_time.py --dropout 0
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from llava.data.dataset import ImageSettings
from llava.image_processing import CLIPPixels
from llava.model import fused_layers, pack
from llava.model.configuration import features_per_image
from llava.train import randomness
from llava.train.arguments import TrainingArguments
from llava.train.lora import add_lora, choose_trainable
from llava.train.packs import choose_feed, choose_order, inner_llava, prepare_model
from llava.train.trainer import LlavaTrainer

sys.path.insert(0, str(Path(__file__).parent))
from train_speed import make_trainer
from vqa_workload import make_records, model_config, random_model, table_questions, write_images

LAYERS, TOWER_LAYERS, RANK = 32, 24, 4


class Parts(TrainerCallback):
    """Time of each part of each step, in ms; what a part within a part takes counts there alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._running = ["other"]
        self._since = time.perf_counter()

    def turn(self) -> None:
        """Give the time since the last turn to the part that ran."""
        now = time.perf_counter()
        self._spent[self._running[-1]] += 1000 * (now - self._since)
        self._since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function, its time counted as a part's."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self._running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self._running.pop()

        return measured

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew."""
        self.turn()
        self.steps.append(dict(self._spent))
        self._spent.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table and return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=30, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="questions a step (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the adapters (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llava_host_time", help="for images")
    options, parts = parser.parse_args(argv), Parts()
    with tempfile.TemporaryDirectory() as directory:
        trainer = tiny_trainer(options, directory, parts)
        with patched(trainer, parts):
            trainer.train()
    print(as_table(parts.steps[options.warm_up :]))
    return 0


def tiny_trainer(options: argparse.Namespace, directory: str, parts: Parts) -> LlavaTrainer:
    """Return the project's own trainer over a model without width."""
    args = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=options.batch,
        max_steps=options.warm_up + options.steps,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=True,
        dataloader_num_workers=1,
        lora_enable=True,
        compile_layers="on",
        fuse_lora="on",
    )
    config = model_config(tiny=True)
    config.num_hidden_layers, config.mm_vision_config["num_hidden_layers"] = LAYERS, TOWER_LAYERS
    model = random_model(config, args.device, args.weight_dtype)
    model = add_lora(model, rank=RANK, alpha=2 * RANK, dropout=options.dropout, bias="none", base_name="random")
    choose_trainable(model, lora=True, projector=True, backbone=False, dtype=torch.float32)
    layers_run = prepare_model(model, args)
    questions = table_questions()
    records = make_records(questions, write_images(options.work, len(questions), (64, 48)), config.vocab_size)
    order = choose_order(records, features_per_image(config, config.mm_vision_config), args)
    feed = choose_feed(
        order, CLIPPixels(config.mm_vision_config["image_size"]), ImageSettings("pad"), 0, args, layers_run
    )
    return make_trainer(model, args, feed, parts)


@contextlib.contextmanager
def patched(trainer: LlavaTrainer, parts: Parts) -> Iterator[None]:
    """Within it the parts of the trainer's steps are timed."""
    llava = inner_llava(trainer.model)
    places = [
        (llava.fused_layers, "run", "compiled layers, forward"),
        (fused_layers, "run_last_layer", "last layer, forward"),
        (llava.get_vision_tower(), "forward", "image encoder"),
        (pack, "tree_mask", "masks"),
        (pack, "block_pack_mask", "masks"),
        (pack, "tree_mask_rows", "masks"),
        (pack, "mean_loss", "loss"),
        (llava, "forward", "rest of the model, forward"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.accelerator, "clip_grad_norm_", "clipping"),
        (randomness, "capture", "states of generators"),
        (trainer, "get_batch_samples", "waiting for a batch"),
        (trainer, "_prepare_inputs", "copies of a batch"),
        (torch.optim.AdamW, "step", "optimizer"),
        (trainer, "read_flags", "reading of flags"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in places:
            stack.enter_context(mock.patch.object(owner, name, parts.timed(getattr(owner, name), label)))
        yield


def as_table(steps: Sequence[dict[str, float]]) -> str:
    """Return medians and shares as a table in Markdown."""
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for step in steps for name in step}
    whole = statistics.median(sum(step.values()) for step in steps)
    rows = [("whole step", whole), *sorted(medians.items(), key=lambda part: -part[1])]
    lines = ["| part | ms a step | share |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value:.2f} | {100 * value / whole:.1f} % |" for name, value in rows)])


if __name__ == "__main__":
    sys.exit(main())
