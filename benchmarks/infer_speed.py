#!/usr/bin/env python3
"""Measure batch answering at LLaVA-1.5-7B's sizes with random weights: image files to answers on disk, in one run.

Questions are a sample of VQAv2's, with its numbers of questions per image; images are drawn noise, 640 x 480 JPEG, all
distinct, since vLLM finds an image again by its content. Every answer has exactly three tokens, a caption 128. The same
questions go to transformers' `LlavaForConditionalGeneration`, to vLLM where it is installed, with the same weights, and
a part of them one at a time to our own model, to count how often answers agree.

Example: python benchmarks/infer_speed.py --output speed.json
         python benchmarks/infer_speed.py --parts --profile      (only GPU utilisation and idle gaps)
         python benchmarks/infer_speed.py --tiny --images 20      (on a CPU, to try it out)
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from device_share import as_lines, device_share, device_spans
from infer_agreement import measure_agreement
from infer_bench import ANSWER_TOKENS, CAPTION_TOKENS, Bench, describe_machine, draw_images, image_size, synchronize
from infer_peers import measure_transformers, measure_vllm

from llava.inference.batch.questions import Question
from llava.inference.session import Session
from llava.model.configuration import LlavaConfig
from llava.model.devices import best_device

PARTS = ("ceiling", "grouped", "shuffled", "single", "captions", "agreement", "transformers", "vllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that are asked for, each printed at once; return the exit code."""
    options = parse_options(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llava").setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    device = torch.device(options.device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), options.images, image_size(options.tiny))
        print(f"drew images in {time.perf_counter() - start:.1f} s", flush=True)
        report: dict[str, Any] = {"machine": describe_machine(device), "rows": []}
        print(report["machine"], flush=True)
        bench = Bench(options, device, Path(folder))
        for part in order_parts(options):
            if time.perf_counter() - start > options.budget:
                print(f"{part}: left out, the budget of {options.budget} s is spent", flush=True)
                continue
            measure(bench, part, report)
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{as_table(report['rows'])}\n\n{report['seconds']} s in all", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if "failed" in report else 0


def measure(bench: Bench, part: str, report: dict[str, Any]) -> None:
    """Measure a part and print its rows at once; a part that fails is noted in the report and leaves the others."""
    try:
        for row in MEASURES[part](bench):
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
    except Exception:  # the other parts are worth having
        print(f"{part} failed:\n{traceback.format_exc()}", flush=True)
        report["failed"] = [*report.get("failed", []), part]


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    add("--images", type=int, default=1500, help="images of the grouped parts (default: %(default)s)")
    add("--captions", type=int, nargs="+", default=[64, 128, 320], help="at once or in all (default: %(default)s)")
    add("--compared", type=int, default=96, help="questions asked one at a time as well (default: %(default)s)")
    add("--peer-images", type=int, default=120, help="images for transformers (default: %(default)s)")
    add("--peer-batches", type=int, nargs="+", default=[32, 64], help="its batch sizes (default: %(default)s)")
    add("--compile", choices=("on", "off"), help="default: on with CUDA")
    add("--workers", type=int, help="processes that decode images (default: what suits the device)")
    add("--device", default=str(best_device()), help="default: %(default)s")
    add("--budget", type=float, default=480, help="seconds after which no further part starts (default: %(default)s)")
    add("--tiny", action="store_true", help="a tiny model in fp32 and tiny images")
    add("--profile", action="store_true", help="print GPU utilisation, idle gaps and kernels")
    add("--verbose", action="store_true", help="print the engine's log")
    add("--output", type=Path, help="JSON to write")
    return parser.parse_args(argv)


def order_parts(options: argparse.Namespace) -> list[str]:
    """Return the parts that are asked for, those with our model first."""
    wanted = {*options.parts, *(["profile"] if options.profile else [])}
    return [part for part in MEASURES if part in wanted]


def measure_ceiling(bench: Bench) -> Iterator[dict[str, Any]]:
    """TFLOP/s of a large matrix product."""
    size = 512 if bench.options.tiny else 8192
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize(bench.device)
        start = time.perf_counter()
        left @ right
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    yield {"part": "ceiling", "case": f"product {size}^3", "tflops": 2 * size**3 / statistics.median(seconds) / 1e12}


def measure_grouped(bench: Bench) -> Iterator[dict[str, Any]]:
    """Questions in file order by image."""
    questions = bench.questions(bench.options.images)
    warm = bench.answer(bench.questions(max(1, bench.options.images // 4)), ANSWER_TOKENS)
    print(f"warmed up in {warm:.1f} s, compiling included", flush=True)
    yield speed_row(bench, "grouped", "ours, 4.24 questions per image", questions, ANSWER_TOKENS)


def measure_shuffled(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same questions in random order."""
    questions = bench.questions(bench.options.images)
    random.Random(0).shuffle(questions)
    yield speed_row(bench, "shuffled", "ours, the same shuffled", questions, ANSWER_TOKENS)


def measure_single(bench: Bench) -> Iterator[dict[str, Any]]:
    """One question per image."""
    questions = bench.single_questions(max(1, bench.options.images * 2 // 3))
    bench.answer(questions[: len(questions) // 8 + 1], ANSWER_TOKENS)
    yield speed_row(bench, "single", "ours, one question per image", questions, ANSWER_TOKENS)


def measure_captions(bench: Bench) -> Iterator[dict[str, Any]]:
    """Long answers."""
    for count in bench.options.captions:
        count = min(count, bench.options.images)
        questions = bench.captions(count)
        bench.answer(questions, 8)
        yield speed_row(bench, "captions", f"ours, {count} captions", questions, CAPTION_TOKENS)


def speed_row(bench: Bench, part: str, case: str, questions: Sequence[Question], new_tokens: int) -> dict[str, Any]:
    """Measure one run of ours."""
    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.answer(questions, new_tokens)
    n_images = len({question.images for question in questions})
    return {
        "part": part,
        "case": case,
        "questions_per_second": len(questions) / seconds,
        "tokens_per_second": len(questions) * new_tokens / seconds,
        "seconds": seconds,
        "tflops": needed_flops(bench.config, questions, n_images, bench.session) / seconds / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
    }


def needed_flops(config: LlavaConfig, questions: Sequence[Question], n_images: int, session: Session) -> float:
    """Return the operations of linear layers on prefixes once per image and on questions, answers left out."""
    wide, inner = config.hidden_size, config.intermediate_size
    linear = 2 * config.num_hidden_layers * (4 * wide * wide + 3 * wide * inner)
    tower = session.model.get_vision_tower()
    tower_linear = 2 * sum(part.numel() for part in tower.parameters()) * (tower.num_patches + 1)
    prefix = len(session.prompt_ids("?", 1)) - 6
    ids = sum(len(session.prompt_ids(question.text, 1)) - prefix for question in questions)
    return linear * (n_images * (tower.num_patches + prefix) + ids) + n_images * tower_linear


def print_profile(bench: Bench) -> Iterator[dict[str, Any]]:
    """GPU utilisation of a run, its longest idle gaps, and the kernels that take longest."""
    count = bench.options.images
    cases = {
        "grouped": (bench.questions(count), ANSWER_TOKENS),
        "single": (bench.single_questions(count), ANSWER_TOKENS),
        "captions": (bench.captions(min(count, 64)), 48),
    }
    is_cuda = bench.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU]
    key = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    for case, (questions, tokens) in cases.items():
        bench.answer(questions, tokens)
        with torch.profiler.profile(activities=kinds) as profiler:
            seconds = bench.answer(questions, tokens)
            synchronize(bench.device)
        share = device_share(device_spans(profiler))
        print(f"profile: {case}, {len(questions)} answers of {tokens} tokens", flush=True)
        if is_cuda:
            print(as_lines(share, seconds), flush=True)
        print(profiler.key_averages().table(sort_by=key, row_limit=24, max_name_column_width=60), flush=True)
        yield {
            "part": "profile",
            "case": f"ours, {len(questions)} answers of {tokens} tokens, {case}, profiled",
            "seconds": seconds,
            "device_busy_share": share.busy / seconds if is_cuda else None,
            "seconds_before_the_device_works": share.first,
        }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return speeds in Markdown."""
    columns = {"case": "", "questions_per_second": "questions/s", "tokens_per_second": "tokens/s", "tflops": "TFLOP/s"}
    lines = [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        if not row.keys() & columns.keys() - {"case"}:
            continue
        cells = [row.get(key, "") for key in columns]
        lines.append(f"| {' | '.join(f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


MEASURES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "ceiling": measure_ceiling,
    "grouped": measure_grouped,
    "shuffled": measure_shuffled,
    "single": measure_single,
    "captions": measure_captions,
    "profile": print_profile,
    "agreement": measure_agreement,
    "transformers": measure_transformers,
    "vllm": measure_vllm,
}


if __name__ == "__main__":
    sys.exit(main())
