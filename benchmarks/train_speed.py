#!/usr/bin/env python3
"""Measure LoRA training at LLaVA-1.5-7B's true sizes on one GPU or several, with and without the shared image prefix.

Our runs are the project's own trainer, data set, collator and model over JPEG files; the peer is transformers' LLaVA
with the same adapters. Weights are random, questions per image and lengths those of `vqa_lengths.json`.

Example: python benchmarks/train_speed.py --output train_speed.json
         python benchmarks/train_speed.py --only shared_fused --gpus 2
         python benchmarks/train_speed.py --tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import TrainerCallback

from llava.clip_image_processor import CLIPPixels
from llava.data.dataset import ImageSettings
from llava.model.attention import sdpa_backends as attention_kernels
from llava.model.configuration import features_per_image
from llava.model.memory import ModelSizes
from llava.train.flags.arguments import is_first_process
from llava.train.flags.training_arguments import CHECKPOINTING, TrainingArguments
from llava.train.lora import add_lora, choose_trainable
from llava.train.packing_setup import BatchPlan, Loader, build_loader, plan_batches, prepare_model
from llava.train.trainer import LlavaTrainer

sys.path.insert(0, str(Path(__file__).parent))
from step_clock import Clock
from train_agreement import measure_agreement
from train_peer import measure_peer
from train_report import as_table, machine, matmul_ceiling, peak_memory, release
from vqa_workload import counted_flops, make_records, model_config, random_model, table_questions, write_images

RANK, ALPHA = 128, 256


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run of ours.

    Attributes:
        batch: questions a step and device.
        dropout: of the adapters.
        share: `--share_image_prefix`.
        compile: `--compile_layers`.
        fuse: `--fuse_lora`.
        checkpointing: `--gradient_checkpointing`.
        alone: one question per image.
        planned: let cuDNN plan attention again for every number of images and of supervised tokens.
    """

    batch: int
    dropout: float = 0.0
    share: bool = True
    compile: str = "on"
    fuse: str = "on"
    checkpointing: bool = False
    alone: bool = False
    planned: bool = False

    def describe(self) -> str:
        """Return the run's label for plots."""
        words = {
            "one question per image": self.alone,
            "images not shared": not self.share and not self.alone,
            f"dropout {self.dropout}": self.dropout > 0,
            "layers not compiled": self.compile == "off",
            "adapters not fused": self.compile == "on" and self.fuse == "off",
            "activations computed again": self.checkpointing,
            "cuDNN's attention": self.planned,
        }
        return ", ".join([f"ours, batches of {self.batch}", *(word for word, applies in words.items() if applies)])


VARIANTS = {
    "shared_fused_largest": Variant(64),
    "shared_fused_large": Variant(48),
    "shared_fused": Variant(24),
    "one_question_fused": Variant(14, alone=True),
    "shared_fused_large_planned": Variant(48, planned=True),
    "recipe": Variant(16, dropout=0.05),
    "shared_fused_dropout": Variant(24, dropout=0.05),
    "shared_compiled": Variant(24, fuse="off"),
    "shared_compiled_dropout": Variant(24, dropout=0.05, fuse="off"),
    "shared_fused_small": Variant(16),
    "shared_fused_checkpointing": Variant(48, checkpointing=True),
    "shared_eager_dropout": Variant(20, dropout=0.05, compile="off", fuse="off"),
    "unshared_eager_dropout": Variant(5, dropout=0.05, share=False, compile="off", fuse="off"),
}
PEERS = {"peer_batch_6": (6, False), "peer_batch_16_checkpointing": (16, True), "peer_batch_4": (4, False)}
AGREEMENT = "agreement"
ORDER = [*list(VARIANTS)[:4], *list(PEERS)[:2], AGREEMENT, *list(VARIANTS)[4:], *list(PEERS)[2:]]
"""The most informative come first, for runs with `--limit`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for and print the table; return the exit code."""
    options = build_parser().parse_args(argv)
    if options.gpus > 1 and "RANK" not in os.environ:
        words = sys.argv[1:] if argv is None else list(argv)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus}"]
        return subprocess.run([*launch, __file__, *words], check=False).returncode
    is_first = is_first_process()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    names = options.only or ORDER
    begun = time.perf_counter()
    report: dict[str, Any] = {"machine": machine(), "gpus": options.gpus, "tiny": options.tiny, "rows": {}}
    report["ceiling_tflops"] = matmul_ceiling()
    for name in names:
        started = time.perf_counter()
        if started - begun > options.limit:
            break
        if is_first:
            print(f"{name}", flush=True)
        try:
            report["rows"][name] = measure(name, options)
        except Exception as error:  # the other runs are still worth their time
            traceback.print_exc()
            report["rows"][name] = {"error": f"{type(error).__name__}: {str(error).split('. ')[0][:300]}"}
        release()
        report["rows"][name]["wall_s"] = round(time.perf_counter() - started, 1)
        if is_first:
            print(f"  {json.dumps(report['rows'][name])}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if is_first:
        print(as_table(report), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*VARIANTS, *PEERS, AGREEMENT], help="of the runs (default: all)")
    add("--steps", type=int, default=10, help="measured steps of a run (default: %(default)s)")
    add("--warm-up", type=int, default=3, help="steps before them, compilation included (default: %(default)s)")
    add("--batch", type=int, help="questions a step and device, instead of each run's own")
    add("--gpus", type=int, default=1, help="processes, one for each GPU (default: %(default)s)")
    add("--workers", type=int, default=6, help="processes that read images, for each GPU (default: %(default)s)")
    add("--profile", type=Path, metavar="FILE", help="write the kernels of one more step of our first run there")
    add("--limit", type=float, default=float("inf"), help="seconds after which no further run starts (default: none)")
    add("--output", type=Path, metavar="FILE", help="JSON file to write")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "llava_train_speed", help="for the images")
    add("--tiny", action="store_true", help="a small model, to try this program on a CPU")
    return parser


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one run."""
    torch.manual_seed(0)
    if name == AGREEMENT:
        return measure_agreement(options.tiny)
    if name in PEERS:
        batch, checkpointing = PEERS[name]
        return measure_peer(options.batch or batch, checkpointing, options)
    variant = VARIANTS[name]
    kernels = [*attention_kernels.WITHOUT_CUDNN, *([SDPBackend.CUDNN_ATTENTION] if variant.planned else [])]
    with mock.patch.object(attention_kernels, "WITHOUT_CUDNN", kernels):
        return measure_ours(variant, options)


def measure_ours(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps and return samples a second, counted TFLOP/s and peak memory of one device."""
    config = model_config(tiny=options.tiny)
    batch = options.batch or variant.batch
    args = training_arguments(variant, batch, options)
    model: nn.Module = random_model(config, args.device, args.weight_dtype)
    rank = 4 if options.tiny else RANK
    model = add_lora(model, rank=rank, alpha=2 * rank, dropout=variant.dropout, bias="none", base_name="random")
    choose_trainable(model, lora=True, projector=True, backbone=False, dtype=torch.float32)
    execution = prepare_model(model, args)
    questions = table_questions()
    if variant.alone:
        questions = [[question] for image in questions for question in image][: len(questions)]
    records = make_records(questions, write_images(options.work, len(questions)), config.vocab_size)
    processor = CLIPPixels(config.mm_vision_config["image_size"])
    plan = plan_batches(records, features_per_image(config, config.mm_vision_config), args)
    loader = build_loader(plan, processor, ImageSettings("pad"), 0, args, execution)
    clock = Clock(args.device.type == "cuda", options.profile, options.warm_up + options.steps)
    options.profile = None
    trainer = make_trainer(model, args, loader, clock)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = clock.seconds()
    seconds = steps[options.warm_up : options.warm_up + options.steps]
    positions, images = work_per_step(loader, plan, batch, args.world_size, options)
    sizes = ModelSizes.of(config)
    median = statistics.median(seconds)
    return {
        "case": dataclasses.replace(variant, batch=batch).describe(),
        "variant": dataclasses.asdict(variant) | {"batch": batch},
        "samples_per_s": round(batch * args.world_size / median, 1),
        "samples_per_s_mean": round(batch * args.world_size * len(seconds) / sum(seconds), 1),
        "kernels_ms": clock.kernels_ms and round(clock.kernels_ms, 1),
        "profiled_ms": clock.profiled_ms and round(clock.profiled_ms, 1),
        "kinds_ms": {
            kind: round(value, 1) for kind, value in sorted(clock.kinds_ms.items(), key=lambda kind: -kind[1])
        },
        "busy": clock.kernels_ms and round(clock.kernels_ms / clock.profiled_ms, 3),
        "step_s": [round(value, 4) for value in steps],
        "positions_per_step": round(positions),
        "images_per_step": round(images, 2),
        "tflops": round(counted_flops(sizes, rank, positions, images) / median / 1e12, 1),
        "peak_gb": peak_memory(),
        "mean_loss": trainer.state.log_history[-1].get("train_loss"),
    }


def make_trainer(model: nn.Module, args: TrainingArguments, loader: Loader, callback: TrainerCallback) -> LlavaTrainer:
    """Return the project's trainer, which saves nothing."""
    return LlavaTrainer(
        model,
        args,
        saver=None,
        train_dataset=loader.dataset,
        train_sampler=loader.sampler,
        data_collator=loader.collator,
        callbacks=[callback],
    )


def training_arguments(variant: Variant, batch: int, options: argparse.Namespace) -> TrainingArguments:
    """Return the flags of a run."""
    return TrainingArguments(
        output_dir=str(options.work / "out"),
        per_device_train_batch_size=batch,
        max_steps=options.warm_up + options.steps + 1,  # the last one is profiled
        learning_rate=2e-4,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the device after each step
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=options.workers,
        **{CHECKPOINTING: variant.checkpointing},
        ddp_find_unused_parameters=False,
        lora_enable=True,
        share_image_prefix=variant.share,
        compile_layers=variant.compile,
        fuse_lora=variant.fuse,
    )


def work_per_step(
    loader: Loader, plan: BatchPlan, batch: int, processes: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Return positions (without padding) and images of a measured step on one device, on average."""
    lengths = loader.dataset.lengths
    if loader.sampler is None:
        whole = plan.costs[:-1] if plan.costs else [batch * sum(lengths) / len(lengths)]
        return statistics.mean(whole), batch
    rows, costs = loader.sampler.order(), loader.sampler.costs()
    first, last = options.warm_up * processes, (options.warm_up + options.steps) * processes
    images = [
        len({plan.records[row].images[0] for row in rows[step * batch : (step + 1) * batch]})
        for step in range(first, last)
    ]
    return statistics.mean(costs[first:last]), statistics.mean(images)


if __name__ == "__main__":
    sys.exit(main())
