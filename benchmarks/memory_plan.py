#!/usr/bin/env python3
"""Compare the planner's predictions with measured peaks of GPU memory, at LLaVA-1.5-7B's true sizes.

Each run is a process of its own that calls the project's own programs.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny
         python benchmarks/memory_plan.py --model-path /tmp/7b --work /tmp/memory --output memory.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from llava.data.records import encode_records, read_records
from llava.eval import model_vqa_loader
from llava.files.overwrite_check import find_overwrite, output_file
from llava.inference.chat.chat import Chat
from llava.inference.session import Sampling, Session
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.memory import ModelSizes
from llava.model.planner.estimate import plan_inference, plan_training
from llava.model.planner.setups import Inference, Training
from llava.model.planner.workload import PaddedRows
from llava.train import train

ROWS, IMAGES = 64, 16
IMAGE_SIZE = (640, 480)
PADDED = PaddedRows(640)  # replaced by rows of the length that is trained on
QUESTION = "Is there a person sitting at the table in the image?"
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every run and print the table; return the exit code, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, type=Path, help="full weights")
    parser.add_argument("--work", required=True, type=Path, help="directory for data and results of the runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--only", choices=RUNS, help="one run; prints its figures as JSON")
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side on the GPU, which has to hold them (default: 1)"
    )
    options = parser.parse_args(argv)
    inputs = {"--model-path": options.model_path}
    if options.output and (message := find_overwrite({"--output": output_file(options.output)}, inputs)):
        parser.error(message)
    if options.only:
        print(json.dumps(measure(options.only, options.model_path, options.work)))
        return 0
    write_data(options.work)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    rows: list[dict] = []
    with ThreadPoolExecutor(max_workers=options.at_once) as pool:
        for row in pool.map(functools.partial(run_apart, options=options), RUNS):
            rows.append(row)
            if options.output:  # after each, so that nothing is lost
                text = json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n"
                options.output.write_text(text, encoding="utf-8")
    print(f"{machine}; {versions}\n\n{as_table(rows)}")
    return int(any("error" in row for row in rows))


def write_data(work: Path) -> None:
    """Write images, records of two lengths, and questions."""
    (work / "images").mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        Image.effect_noise(IMAGE_SIZE, 50 + index).convert("RGB").save(work / "images" / f"{index}.jpg")
    records, questions = [], []
    for index in range(ROWS):
        image, text = f"{index % IMAGES}.jpg", QUESTION + (" Yes or no?" if index % 2 else "")
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": index, "image": image, "conversations": turns})
        questions.append({"question_id": index, "image": image, "text": text})
    (work / "data.json").write_text(json.dumps(records))
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def run_apart(name: str, options: argparse.Namespace) -> dict:
    """Run one measurement in a process of its own; a failure becomes part of the row."""
    command = [sys.executable, __file__, "--model-path", str(options.model_path), "--work", str(options.work)]
    print(f"running {name}", flush=True)
    log = options.work / f"{name.replace(' ', '-')}.log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run([*command, "--only", name], stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        said = log.read_text(encoding="utf-8").strip()
        print(done.stdout[-1500:], said[-1500:], file=sys.stderr)
        return {"run": name, "error": (said.splitlines() or ["no message"])[-1]}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    return row if options.at_once == 1 else {key: value for key, value in row.items() if key != "device"}


def measure(name: str, model_path: Path, work: Path) -> dict:
    """Run one setup and return prediction and peaks in bytes."""
    setup, action = RUNS[name]
    config = open_checkpoint(model_path).config
    sizes, lengths = ModelSizes.of(config), row_lengths(model_path, work)
    setup = with_length(setup, max(lengths))
    parts = plan_training(sizes, setup) if isinstance(setup, Training) else plan_inference(sizes, setup)
    action(model_path, work / name.replace(" ", "-"), work, setup)
    row = {"run": name, "length": max(lengths), "predicted": sum(parts.values()), "parts": parts}
    if torch.cuda.is_available():
        row |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        free, total = torch.cuda.mem_get_info()
        row["device"] = total - free
    return row


def with_length(setup: Training | Inference, longest: int) -> Training | Inference:
    """Return the setup for rows of this many positions; prompts lack the answer's three tokens."""
    if isinstance(setup, Training):
        return dataclasses.replace(setup, workload=PaddedRows(longest))
    return dataclasses.replace(setup, length=longest - 2)


def row_lengths(model_path: Path, work: Path) -> list[int]:
    """Return the positions of each training row."""
    checkpoint = open_checkpoint(model_path)
    patches = ModelSizes.of(checkpoint.config).patches
    records, _ = encode_records(
        read_records(work / "data.json"),
        "vicuna_v1",
        checkpoint.tokenizer,
        image_folder=work / "images",
        patches_per_image=patches,
        max_length=2048,
    )
    return [len(record.input_ids) - 1 + patches for record in records]


def run_training(model_path: Path, output: Path, work: Path, setup: Training) -> None:
    """Train three steps with the flags of the task script."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    flags = {
        "model_name_or_path": model_path,
        "data_path": work / "data.json",
        "image_folder": work / "images",
        "image_aspect_ratio": "pad",
        "output_dir": output,
        "lora_enable": True,
        "lora_r": setup.rank,
        "lora_alpha": 2 * setup.rank,
        "lora_dropout": setup.dropout,
        "learning_rate": 2e-4,
        "mm_projector_lr": 2e-5,
        "per_device_train_batch_size": setup.batch,
        "gradient_checkpointing": setup.checkpointing,
        "share_image_prefix": False,  # the plan is for rows of this length
        "bits": setup.bits,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 2,
        "logging_steps": 1,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    words += ["--deepspeed", f"scripts/zero{setup.zero}.json"] if setup.zero else []
    if train.main(words):
        raise SystemExit(f"training failed: {words}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_questions(model_path: Path, output: Path, work: Path, setup: Inference) -> None:
    """Answer the questions in batches."""
    words = ["--model-path", model_path, "--question-file", work / "questions.jsonl", "--image-folder", work / "images"]
    words += ["--answers-file", output / "answers.jsonl", "--max_new_tokens", setup.new_tokens, "--overwrite"]
    words += ["--batch-size", setup.batch, "--temperature", 0]
    if model_vqa_loader.main([str(word) for word in words]):
        raise SystemExit("answering failed")


def run_chat(model_path: Path, output: Path, work: Path, setup: Inference) -> None:
    """Answer one question about an image in the chat; random weights seldom end an answer early."""
    session = Session.load(str(model_path), bits=setup.bits)
    chat = Chat(session, Sampling(max_new_tokens=setup.new_tokens))
    image = Image.open(work / "images/0.jpg").convert("RGB")
    for _ in chat.reply(QUESTION, [image]):
        pass
    print(f"{chat.computed_positions} positions", file=sys.stderr)


RUNS: dict[str, tuple[Training | Inference, Callable[[Path, Path, Path, Training | Inference], None]]] = {
    "LoRA r=128, batch 16, checkpointing, ZeRO-2": (Training(PADDED), run_training),
    "LoRA r=128, batch 4, ZeRO-2": (Training(PADDED, batch=4, checkpointing=False), run_training),
    "QLoRA 4 bit r=64, batch 8, checkpointing, ZeRO-2": (
        Training(PADDED, batch=8, rank=64, bits=4),
        run_training,
    ),
    "LoRA r=128, batch 8, checkpointing, without DeepSpeed": (Training(PADDED, batch=8, zero=0), run_training),
    "32 questions at a time, 16 bit": (Inference(batch=32, new_tokens=8), run_questions),
    "one chat, 4 bit, 512 tokens": (Inference(batch=1, new_tokens=512, bits=4), run_chat),
}


def as_table(rows: Sequence[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| run | predicted (GB) | measured (GB) | difference | reserved (GB) |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "allocated" in row:
            off = row["predicted"] / row["allocated"] - 1
            figures = f"{row['allocated'] / 1e9:.2f} | {100 * off:+.1f} % | {row['reserved'] / 1e9:.2f}"
        else:
            figures = f"{row.get('error', '')} | | "
        predicted = f"{row['predicted'] / 1e9:.2f}" if "predicted" in row else ""
        lines.append(f"| {row['run']} | {predicted} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
