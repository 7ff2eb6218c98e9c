#!/usr/bin/env python3
"""Measure one chat about an image in 16, 8 and 4 bit: size of the weights, loading, peak memory, speed.

Each row is a process of its own. Its use of the device includes CUDA's own memory.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny
         python scripts/quantize_checkpoint.py --model-path /tmp/7b --save-path /tmp/7b-4bit --bits 4
         python benchmarks/quantized_chat.py --model-path /tmp/7b --quantized-path /tmp/7b-4bit --output chat.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.files.overwrite_check import find_overwrite, output_file
from llava.inference.chat.chat import Chat
from llava.inference.session import Sampling, Session
from llava.model.devices import best_device
from llava.model.quantization import import_bitsandbytes

IMAGE_SIZE = (640, 480)
QUESTION = "What is in the image?"
FIRST_TOKENS = 3
"""First tokens that are timed, whose median counts."""
LIBRARIES = ("torch", "transformers", "bitsandbytes")
CASES = {"16": "16 bit", "8": "8 bit (LLM.int8)", "4": "4 bit (NF4)", "saved": "saved quantised directory"}
COLUMNS = {
    "case": "weights",
    "weight_bytes": "size (GB)",
    "load_seconds": "load (s)",
    "peak_allocated": "peak allocated (GB)",
    "peak_reserved": "peak reserved (GB)",
    "peak_device": "peak on the device (GB)",
    "first_token_seconds": "first token (s)",
    "tokens_per_second": "tokens/s",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case and print the table; return the exit code, 1 if a case failed."""
    options = parse_options(argv)
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    cases = [case for case in CASES if case != "saved" or options.quantized_path]
    words = list(sys.argv[1:] if argv is None else argv)
    machine, rows, failed = describe_machine(options), [], 0
    for case in cases:
        try:
            rows.append(run_case(words, case, torch.device(options.device)))
        except subprocess.CalledProcessError as error:
            print(f"{CASES[case]}: {error}", file=sys.stderr)
            failed = 1
        if options.output:  # after each, so that nothing is lost
            text = json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n"
            options.output.write_text(text, encoding="utf-8")
    print(f"{machine}\n\n{as_table(rows)}")
    return failed


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", required=True, help="directory of full weights in 16 bit")
    add("--quantized-path", help="the same, written by scripts/quantize_checkpoint.py")
    add("--device", default=str(best_device()), help="default: %(default)s")
    add("--new-tokens", type=int, default=512, help="of an answer, above 1 (default: %(default)s)")
    add("--runs", type=int, default=3, help="answers timed, whose median counts (default: %(default)s)")
    add("--output", type=Path, help="JSON to write")
    add("--only", choices=CASES, help="measure one case in this process and print it as JSON")
    options = parser.parse_args(argv)
    inputs = {"--model-path": options.model_path, "--quantized-path": options.quantized_path}
    if options.output and (message := find_overwrite({"--output": output_file(options.output)}, inputs)):
        parser.error(message)
    return options


def run_case(words: Sequence[str], case: str, device: torch.device) -> dict[str, Any]:
    """Measure one case in a process of its own, and the memory the device gives to it.

    Raises:
        subprocess.CalledProcessError: if it fails; its errors are on stderr.
    """
    print(f"measuring {CASES[case]}", file=sys.stderr)
    free = free_bytes(device)
    command = [sys.executable, __file__, *words, "--only", case]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return {**row, "peak_device": free - row["free_at_end"] if device.type == "cuda" else None}


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes; 0 on the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, ask and time one case; bytes and seconds by name."""
    device, case = torch.device(options.device), options.only
    path = options.quantized_path if case == "saved" else options.model_path
    if case != "16":
        import_bitsandbytes()  # seconds of its own, which are no loading
    start = time.perf_counter()
    session = Session.load(path, bits=16 if case == "saved" else int(case), device=device)
    synchronize(device)
    load_seconds = time.perf_counter() - start
    weight_bytes = sum(tensor.nbytes for tensor in session.model.state_dict().values())  # with all statistics
    image = Image.effect_noise(IMAGE_SIZE, 64).convert("RGB")
    length = session.spliced_length(session.prepare(QUESTION, [image], max_new_tokens=options.new_tokens))
    chat = Chat(EndlessSession(**vars(session)))
    warm_tokens = 2 if case == "8" else options.new_tokens  # 8 bit is slow, and no CUDA graph is captured
    answer_seconds(chat, image, length, warm_tokens)  # kernels are compiled, storage grows, CUDA graphs are captured
    first_token = statistics.median(answer_seconds(chat, image, length, 1) for _ in range(FIRST_TOKENS))
    whole = statistics.median(answer_seconds(chat, image, length, options.new_tokens) for _ in range(options.runs))
    is_cuda = device.type == "cuda"
    return {
        "case": CASES[case],
        "weight_bytes": weight_bytes,
        "load_seconds": load_seconds,
        "peak_allocated": torch.cuda.max_memory_allocated(device) if is_cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if is_cuda else None,
        "first_token_seconds": first_token,
        "free_at_end": free_bytes(device),  # PyTorch gives nothing back before, so this is the peak
        "tokens_per_second": (options.new_tokens - 1) / (whole - first_token),
        "dtype": str(session.model.dtype),
        "prompt_positions": length,
        "new_tokens": options.new_tokens,
    }


class EndlessSession(Session):
    """A session whose answers go on to the longest length."""

    @property
    def stop_ids(self) -> list[int]:
        """None."""
        return []


def answer_seconds(
    chat: Chat, image: Image.Image, length: int, new_tokens: int, sampling: Sampling | None = None
) -> float:
    """Return the seconds of an answer of exactly `new_tokens`.

    Args:
        chat: with a session whose answers don't end.
        image: asked about.
        length: positions of the prompt.
        new_tokens: to be generated.
        sampling: how they are chosen; None = greedy.

    Raises:
        RuntimeError: if the answer has another length.
    """
    device = chat.session.model.device
    chat.reset()
    chat.sampling = dataclasses.replace(sampling or Sampling(), max_new_tokens=new_tokens)
    pieces = chat.reply(QUESTION, [image])
    synchronize(device)
    start = time.perf_counter()
    for _ in pieces:
        pass
    synchronize(device)
    seconds = time.perf_counter() - start
    n_found = chat.computed_positions + 1 - length  # the last one is not fed
    if n_found != new_tokens:
        raise RuntimeError(f"{n_found} tokens were generated instead of {new_tokens}; the times mean nothing")
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the work given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(options: argparse.Namespace) -> str:
    """Return device, versions and sizes of the measurement in a line."""
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
    return f"{name}, {versions}; one image, {options.new_tokens} new tokens, median of {options.runs} answers"


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown, bytes in GB (10^9)."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    lines += [f"| {' | '.join(_cell(key, row[key]) for key in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value / 1e9:.2f}" if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
