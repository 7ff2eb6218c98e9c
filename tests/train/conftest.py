"""What several tests of training share: whole runs in this process on the small model."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.convert import write_original
from llava.train import callbacks
from llava.train.train import main

TINY = Path(__file__).parents[2] / "playground/llava-tiny"


@pytest.fixture(scope="module", autouse=True)
def quick_plot() -> Iterator[None]:
    """Let runs write a `loss.png` without a plot: drawing takes longer than their steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_curves", lambda history, path, **options: Path(path).touch())
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Return a directory of llava-tiny in fp32, so that sums are not rounded to the fp16 it is released in."""
    directory = tmp_path_factory.mktemp("base") / "llava-tiny"
    directory.mkdir()
    write_original(open_checkpoint(TINY), directory, torch.float32)
    return directory


@pytest.fixture(scope="session")
def train_tiny(goldens, tiny_base, tmp_path_factory) -> Callable[..., int]:
    """Return the function (output directory, rows, *flags) -> exit code of a run that starts from llava-tiny."""

    def run(output, rows, *flags, base=tiny_base):
        data = tmp_path_factory.mktemp("data") / "data.json"
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", base, "--data_path", data, "--image_folder", goldens / "images"]
        words += ["--output_dir", output, "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
        words += ["--logging_steps", "1", "--save_strategy", "no", "--model_max_length", "256"]
        words += ["--lr_scheduler_type", "constant", *flags]
        return main([str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path, str], list[float]]:
    """Return the function (output directory, key) -> what was logged under that key."""

    def read(output, key):
        lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    return read


@pytest.fixture(scope="session")
def deepspeed() -> None:
    """Import what DeepSpeed needs, also when it starts, so that no forked process has to."""
    pytest.importorskip("deepspeed")
    importlib.import_module("torch.utils.cpp_extension")
    torch.compile(len)  # imports the compiler, as do decorators in DeepSpeed's optimizers


@pytest.fixture
def train_forked(goldens, tmp_path) -> Callable[..., Path]:
    """Return the function (name, rows, *flags, processes=, before=, code=) -> output directory of a forked run.

    Its processes start from the golden model and meet on the loopback, as under torchrun; the libraries are not loaded
    again. All end with `code`; what each printed is in `name.RANK.log` beside the directory.
    """

    def run(name, rows, *flags, processes=2, before=None, code=0):
        data, output = tmp_path / "data.json", tmp_path / name
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", data, "--output_dir", output]
        words += ["--image_folder", goldens / "images", "--use_cpu", "True", "--report_to", "none"]
        words += ["--disable_tqdm", "True", "--logging_steps", "1", "--model_max_length", "256", *flags]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        children = []
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = ([str(word) for word in words], places, before, tmp_path / f"{name}.{rank}.log")
            children.append(context.Process(target=_run_process, args=arguments))
            children[-1].start()
        for child in children:
            child.join(240)
            child.kill()
        logs = "".join(path.read_text() for path in sorted(tmp_path.glob(f"{name}.*.log")))
        assert [child.exitcode for child in children] == [code] * processes, logs[-6000:]
        return output

    return run


def _run_process(words: list[str], places: dict[str, object], before: Callable[[], None] | None, log: Path) -> None:
    stream = log.open("w")
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    sys.stdout, sys.stderr = stream, stream
    os.environ.update({name: str(value) for name, value in places.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    code = 1
    try:
        if before is not None:
            before()
        code = main(words)
    except BaseException:
        traceback.print_exc()
    stream.flush()
    os._exit(code)
