"""Fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
GOLDENS = Path(__file__).resolve().parent / "data" / "goldens"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run torch on one thread: at the sizes of these tests more of them only wait for each other."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def level_of_the_log() -> Iterator[None]:
    """Give the package's log the level back that it had: programs set it."""
    logger = logging.getLogger("llava")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Return the function name -> path of a file beside the repository, which skips where it is absent.

    Continuous integration (`CI=true`) always has the file, so there its absence is a failure.
    """

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            message = f"{path} is not here"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the directory of what the original implementation computes."""
    return GOLDENS


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """Return the function name -> content of a golden JSON file."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizers() -> dict[bool, Any]:
    """Return the goldens' tokenizer by its `legacy` flag."""
    from llava.tokenization import LlavaTokenizer

    path = str(GOLDENS / "llava-v1.5-golden" / "tokenizer.model")
    return {legacy: LlavaTokenizer(path, legacy=legacy, pad_token="<unk>") for legacy in (False, True)}


@pytest.fixture(scope="session")
def tokenizer(tokenizers) -> Any:
    """Return the goldens' tokenizer as Vicuna sets it."""
    return tokenizers[False]


@pytest.fixture(scope="session")
def golden_model() -> Any:
    """Return what `load_pretrained_model` gives for the goldens' full checkpoint, in fp32 on the CPU."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(GOLDENS / "llava-v1.5-golden"), None, "golden", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Return the function that builds a LLaVA with random weights; keywords go into its config."""

    def build(seed: int = 0, **changes: Any) -> Any:
        import torch

        from llava.model.configuration import LlavaConfig
        from llava.model.llava_llama import LlavaLlamaForCausalLM

        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 8,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        sizes = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "mm_vision_config": vision,
            "mm_hidden_size": 16,
            "mm_projector_type": "mlp2x_gelu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        model = LlavaLlamaForCausalLM(LlavaConfig(**{**sizes, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def load_program() -> Callable[[str], Any]:
    """Return the function path in the repository -> module of a program that is no part of the package."""

    def load(path: str) -> Any:
        spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        return program

    return load


_UNTIL_KILLED = """
import runpy, sys, time
from llava.model import weight_writer
write, count = weight_writer._write_all, 0
def write_slowly(stream, content):
    global count
    write(stream, content)
    count += 1
    if count == 20:
        print("half way", flush=True)
        time.sleep(60)
weight_writer._write_all = write_slowly
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def kill_while_writing() -> Callable[..., None]:
    """Return the function (path in the repository, flags) that kills a program when it has written some tensors."""

    def run(path: str, *words: str) -> None:
        command = [sys.executable, "-c", _UNTIL_KILLED, path, *words]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
            while "half way" not in process.stdout.readline():
                assert process.poll() is None
            process.kill()

    return run
