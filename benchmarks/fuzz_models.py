#!/usr/bin/env python3
"""Give hostile and damaged model directories to the programs: one message and an exit code, nothing else.

Each input is a small model with one or two of its files changed: numbers, types and texts of its settings, JSON nested
deep or cut off, bytes of its vocabulary and weights. Inputs follow from `--seed` and their number. A traceback, a run
longer than `--seconds`, the end of the process, and a value that no model has with exit code 0 and another answer than
the model's are findings, which stay under `--keep`.

Example: python benchmarks/fuzz_models.py --count 1000 --workers 2
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_processes

os.environ["HF_HUB_OFFLINE"] = "1"  # a base that is recorded by a hub's id is not looked for
ROOT = Path(__file__).resolve().parents[1]
MODELS_PER_PROCESS = 50
PLAUSIBLE = (1e-12, 1e9)  # numbers outside are in no model, besides 0
MODEL, BASE, ADAPTER, PROJECTOR, TOWER, HF = (
    "llava-tiny",
    "llava-v1.5-golden",
    "llava-v1.5-golden-task-lora",
    "golden-pretrained-projector",
    "clip-vit-tiny-patch14-56",
    "hf",
)
NUMBERS = (0, -1, 1, 2, 3, 7, 99_999, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e300, 1e30)
OTHERS = (True, False, None, "", "x", "1", "\ud800", "\0", "../..", "/dev/zero", [], {}, [1], [None], {"x": 1}, [[]])
TEXTS = ("mlp99999x_gelu", "mlp0x_gelu", "identity", "linear", "no-such-activation", "relu", "patch", "cls", "anyres")
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500)
"""Values as they are written, which no Python object makes."""
NEW_KEYS = (
    "rope_scaling", "rope_theta", "rope_parameters", "head_dim", "partial_rotary_factor", "quantization_config",
    "num_labels", "id2label", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "to_dict", "attribute_map", "_attn_implementation",
    "attn_implementation", "problem_type", "pruned_heads", "torchscript", "chunk_size_feed_forward", "auto_map",
    "layer_types", "sliding_window", "dtype", "torch_dtype", "image_grid_pinpoints", "mlp_bias", "attention_bias",
    "architectures", "__class__", "vision_config", "text_config", "model_type", "sub_configs", "keys_to_ignore",
    "name_or_path", "per_layer_config", "cache_implementation", "experts_implementation",
)  # fmt: skip
"""Keys of a config that the small models' files don't have."""


class Plan(NamedTuple):
    """A model to be changed: its directory, further flags, and the files to change."""

    model: str
    flags: tuple[str, ...]
    files: tuple[str, ...]


class Input(NamedTuple):
    """A changed model in a folder, and the program that is given it; `is_absurd` where no model is like it."""

    folder: Path
    plan: Plan
    program: str
    change: str
    is_absurd: bool


PLANS = (
    Plan(MODEL, (), ("config.json",) * 6 + ("preprocessor_config.json",) * 3 + ("generation_config.json",)),
    Plan(MODEL, (), ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")),
    Plan(MODEL, (), ("model.safetensors", "processor_config.json")),
    Plan(BASE, (), ("config.json", "pytorch_model.bin.index.json", "pytorch_model-00002-of-00003.bin")),
    Plan(ADAPTER, ("--model-base", BASE), ("config.json", "adapter_config.json", "adapter_model.safetensors")),
    Plan(PROJECTOR, ("--model-base", BASE), ("config.json", "mm_projector.bin")),
    Plan(HF, (), ("config.json", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")),
)


def make_models(folder: Path) -> None:
    """Copy the small models into a folder, and write one of them in the llava-hf layout."""
    shutil.copytree(ROOT / "playground" / MODEL, folder / MODEL)
    for name in (BASE, ADAPTER, PROJECTOR, TOWER):
        shutil.copytree(ROOT / "tests" / "data" / "goldens" / name, folder / name)
    code, _, messages = run_program(
        ["--from", str(folder / MODEL), "--to", str(folder / HF), "--layout", "hf"], "original"
    )
    if code:
        raise RuntimeError(messages)
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": "1", "image": "image.png", "conversations": turns}]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "image.png")


def change_settings(content: Any, rng: random.Random) -> tuple[str, str, bool]:
    """Return the text of a JSON file with one value changed, the change in words, and whether no model has it."""
    places: list[tuple[Any, Any]] = []
    _collect(content, places)
    if isinstance(content, dict) and (not places or rng.random() < 0.2):
        places = [(content, rng.choice(NEW_KEYS))]
    if not places:
        return rng.choice(RAW), "replaced", True
    holder, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0 and (isinstance(holder, list) or key in holder):
        del holder[key]
        return json.dumps(content), f"{key} removed", False
    value = rng.choice(NUMBERS if kind < 6 else OTHERS if kind < 8 else TEXTS)
    if kind == 9:
        value, raw = "RAW-VALUE", rng.choice(RAW)
        holder[key] = value
        return json.dumps(content).replace(f'"{value}"', raw), f"{key} = {raw[:20]}", True
    holder[key] = value
    is_absurd = type(value) in (int, float) and not (value == 0 or PLAUSIBLE[0] <= value <= PLAUSIBLE[1])
    return json.dumps(content), f"{key} = {value!r}", is_absurd


def _collect(content: Any, places: list[tuple[Any, Any]]) -> None:
    keys = list(content) if isinstance(content, dict) else range(min(len(content), 20))
    for key in keys[:200] if isinstance(keys, list) else keys:
        places.append((content, key))
        if isinstance(content[key], (dict, list)):
            _collect(content[key], places)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return data cut off, emptied, or with some bytes replaced, most of them near the start."""
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        return rng.choice((b"", b"\0", rng.randbytes(1000), b"<html>", bytes(len(data))))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        at = rng.randrange(1 + min(len(changed), rng.choice((16, 1000, len(changed)))))
        changed[at : at + 1] = rng.randbytes(rng.choice((0, 1, 1, 1, 4)))
    return bytes(changed)


def change_file(path: Path, rng: random.Random) -> tuple[str, bool]:
    """Change a file of a model; return the change in words, and whether no model has it."""
    if path.suffix == ".json" and rng.random() < 0.9:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        text, words, is_absurd = change_settings(content, rng)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return f"{path.name}: {words}", is_absurd
    path.write_bytes(change_bytes(path.read_bytes() if path.is_file() else b"{}", rng))
    return f"{path.name}: bytes", False


def make_input(seed: int, number: int, models: Path, folder: Path) -> Input:
    """Make the input of a number in an empty folder."""
    rng = random.Random(f"{seed} {number}")
    plan = rng.choice(PLANS)
    for source in models.iterdir():
        if source.name != plan.model:
            (folder / source.name).symlink_to(source)
    shutil.copytree(models / plan.model, folder / plan.model)
    change, is_absurd = change_file(folder / plan.model / rng.choice(plan.files), rng)
    program = rng.choice(("answer",) * 6 + ("plan", "original", "hf", "merge", "doctor"))
    program = "original" if program == "merge" and plan.model != ADAPTER else program
    return Input(folder, plan, program, f"{plan.model} {change}", is_absurd)


def words_of(plan: Plan, program: str, folder: Path, image: Path) -> list[str]:
    """Return the command line of a program that is given a model."""
    model, flags = str(folder / plan.model), [flag if flag[0] == "-" else str(folder / flag) for flag in plan.flags]
    if program == "plan":
        return ["--model-path", model, "--infer", "--gpu-memory", "80"]
    if program == "doctor":
        data = ["--data_path", str(image.with_name("data.json")), "--image_folder", str(image.parent)]
        return [*data, "--model_name_or_path", model]
    if program == "merge":
        return ["--model-path", model, *flags, "--save-model-path", str(folder / "out"), "--no-parity"]
    if program in ("original", "hf"):
        return ["--from", model, *flags, "--to", str(folder / "out"), "--layout", program]
    words = ["--model-path", model, *flags, "--image-file", str(image), "--query", "What colour is it?"]
    return [*words, "--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "8"]


def run_program(words: Sequence[str], program: str) -> tuple[int, str, str]:
    """Run a program in this process; return exit code, answer and messages."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = import_program(program)(words)
    return code, out.getvalue(), err.getvalue()


@functools.lru_cache
def import_program(program: str) -> Callable[[Sequence[str]], int]:
    """Return the `main` of a program."""
    names = {"answer": "llava.eval.run_llava", "plan": "llava.model.plan", "doctor": "llava.data.doctor.__main__"}
    names |= {"merge": "merge_lora_weights"}
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(names.get(program, "convert_checkpoint")).main


def try_one(given: Input, image: Path, answers: set[str]) -> tuple[str, bool]:
    """Run the program on an input; return the result and whether it is a finding."""
    try:
        words = words_of(given.plan, given.program, given.folder, image)
        code, answer, messages = run_program(words, given.program)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})", True
    if code:
        errors = [line for line in messages.splitlines() if line.startswith("error: ")]
        is_reported = len(errors) == 1 or given.program in ("plan", "doctor")
        return ("refused", False) if is_reported else (f"exit code {code} with {messages[-200:]!r}", True)
    if given.program != "answer":
        return "done", False
    if answer in answers:
        return "the model's answer", False
    return f"another answer{f', {answer[:60]!r}' if given.is_absurd else ''}", given.is_absurd


def keep(options: argparse.Namespace, models: Path, number: int) -> Path:
    """Write a finding's model, and return where."""
    folder = options.keep / f"{options.seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = make_input(options.seed, number, models, folder)
    for link in [path for path in folder.iterdir() if path.is_symlink()]:
        link.unlink()
    return folder / given.plan.model


def run_worker(options: argparse.Namespace) -> int:
    """Try a range of inputs as a worker process; return the exit code."""
    answers, image = set(options.answers), options.models / "image.png"
    run_program(words_of(PLANS[0], "answer", options.models, image), "answer")  # imports are not counted

    def attempt(number: int) -> tuple[str, bool, str]:
        with tempfile.TemporaryDirectory() as folder:
            given = make_input(options.seed, number, options.models, Path(folder))
            return *try_one(given, image, answers), f"{given.program}: {given.change}"

    return fuzz_processes.run_worker(options, attempt)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fuzz_processes.add_arguments(parser, count=500, seconds=10, keep="fuzz_models")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)  # both flags are a worker's
    parser.add_argument("--answers", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.first is not None:
        return run_worker(options)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_models(models)
        image = models / "image.png"
        answers = {run_program(words_of(plan, "answer", models, image), "answer")[1] for plan in PLANS}
        command = [__file__, "--models", str(models), "--answers", *sorted(answers)]
        outcomes = fuzz_processes.run_workers(options, command, MODELS_PER_PROCESS)
        return fuzz_processes.report(options, outcomes, lambda number: keep(options, models, number))


if __name__ == "__main__":
    sys.exit(main())
