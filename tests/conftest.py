"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU Triton's kernels are interpreted; read at its import

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
GOLDENS = Path(__file__).resolve().parent / "data" / "goldens"

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")  # how long an example takes decides no test


def pytest_collection_finish() -> None:
    """Spare Python's garbage collector the million objects of libraries and test items, which never become garbage.

    Every training run ends with a full collection, and a forked process would copy the memory that one looks through.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give the collector everything back: some libraries report what is left at the interpreter's exit."""
    gc.unfreeze()


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


@pytest.fixture(autouse=True)
def transformers_log() -> Iterator[list[str]]:
    """Yield what transformers logs of deprecated calls and doubtful configs; it fails a test that leaves any of it.

    pyproject.toml makes errors of the warnings that transformers raises instead.
    """
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.search("deprecated|to instantiate a model of type", record.getMessage()):
                messages.append(record.getMessage())

    logger, collector = logging.getLogger("transformers"), Collector()
    logger.addHandler(collector)
    yield messages
    logger.removeHandler(collector)
    assert not messages


@pytest.fixture(scope="session")
def triton_interpreter() -> None:
    """Skip where Triton's interpreter can't run kernels on CPU tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this machine has a GPU, on which the kernels themselves are tested")


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


@pytest.fixture
def pretend_gpu(monkeypatch) -> Callable[..., Any]:
    """Return the function (compute capability, installed software) -> machine that all CUDA devices then are."""
    from llava.model import capabilities

    inspect = capabilities.inspect_machine

    def pretend(capability, installed=(capabilities.TRITON, capabilities.COMPILER)):
        machine = capabilities.Machine("cuda", "GPU", capability, installed=frozenset(installed))
        monkeypatch.setattr(
            capabilities, "inspect_machine", lambda device: machine if device.type == "cuda" else inspect(device)
        )
        return machine

    return pretend


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """Return the function name -> content of a golden JSON file."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizers() -> dict[bool, Any]:
    """Return the goldens' tokenizer by its `legacy` flag."""
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

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

    def build(seed: int = 0, model_class: Any = None, **changes: Any) -> Any:
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
        model = (model_class or LlavaLlamaForCausalLM)(LlavaConfig(**{**sizes, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_packed_model(tiny_model) -> Callable[..., Any]:
    """Return `tiny_model` of a LLaVA that takes packs, as training builds it."""
    from llava.model.packed.forward import PackedLlavaForCausalLM

    return functools.partial(tiny_model, model_class=PackedLlavaForCausalLM)


@pytest.fixture(scope="session")
def load_program() -> Callable[[str], Any]:
    """Return the function path in the repository -> module of a program that is no part of the package."""

    def load(path: str) -> Any:
        spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        return program

    return load


@pytest.fixture(scope="session")
def fork() -> Callable[..., multiprocessing.Process]:
    """Return the function (action, log of stderr) -> started process, which ends with the code that `action` returns.

    It is forked, so it imports nothing again, and it can really be killed.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")

    def act(action: Callable[[], int], log: str | Path) -> None:
        with Path(log).open("w", encoding="utf-8") as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            code = action()
        os._exit(code)

    def start(action: Callable[[], int], log: str | Path = os.devnull) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=act, args=(action, log))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def quick_look_for_dead_workers() -> Iterator[None]:
    """Let torch's DataLoader wait 0.2 s instead of 5 s before it looks whether a worker process is dead."""
    from torch.utils.data import _utils
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    get_data = _MultiProcessingDataLoaderIter._try_get_data
    assert get_data.__defaults__ == (_utils.MP_STATUS_CHECK_INTERVAL,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        patch.setattr(get_data, "__defaults__", (0.2,))
        yield


@pytest.fixture(scope="session")
def kill_while_writing(fork) -> Callable[..., None]:
    """Return the function (main, flags) that runs a program until it has written some tensors and kills itself."""

    def run(main: Callable[[list[str]], int], words: list[str]) -> None:
        from llava.model.checkpoint import write_tensors

        def until_killed() -> int:
            write, writes = write_tensors.write_all, itertools.count(1)

            def write_and_die(stream: Any, content: Any) -> None:
                write(stream, content)
                if next(writes) == 20:
                    os.kill(os.getpid(), signal.SIGKILL)

            write_tensors.write_all = write_and_die
            return main(words)

        process = fork(until_killed)
        process.join()
        assert process.exitcode == -signal.SIGKILL

    return run
