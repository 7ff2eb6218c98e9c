"""Killed, stopped and failed runs on a tiny model: once resumed, they equal the uninterrupted run.

A run is a forked process: it costs no imports, and it can really be killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer

from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights
from llava.train.fault_tolerance.checkpoint_dir import list_checkpoints, newest_valid
from llava.train.train import main
from llava.train.trainer import LlavaTrainer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.usefixtures("deepspeed"),
]

IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png", "gray.jpg", "alpha.png"]
ROOT = Path(__file__).parents[3]
KILLED = -signal.SIGKILL


def row(index, image=None):
    question = ("<image>\n" if image else "") + f"What number is {index}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {index}"}]
    return {"id": index, "conversations": turns, **({"image": image} if image else {})}


ROWS = [*(row(index, name) for index, name in enumerate(IMAGES)), row(6), row(7), row(8)]
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.3"]
LORA += ["--mm_projector_lr", "1e-3"]
SAVED = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def command(goldens, tmp_path_factory):
    """Return the function (output directory, *flags, rows=) -> words of a command line."""

    def words(output, *flags, rows=ROWS):
        data = tmp_path_factory.mktemp("data") / "data.json"
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", data]
        words += ["--image_folder", goldens / "images", "--output_dir", output, "--learning_rate", "1e-3"]
        words += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
        words += ["--num_train_epochs", "2", "--model_max_length", "256", "--save_strategy", "no", *flags]
        return [str(word) for word in words]

    return words


def start(words, before=lambda: None, environment=None):
    """Fork a process that trains; return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.environ.update(environment or {})
            before()
            code = main(words)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def end_of(child):
    """Wait for a process; return its exit code, or the signal's number below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(words, before=lambda: None):
    return end_of(start(words, before))


def run_together(words, before=lambda rank: None, processes=2):
    """Run as `torchrun` and DeepSpeed's launcher do; return the exit codes by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):

        def prepare(rank=rank):
            AcceleratorState._reset_state(reset_partial_state=True)
            before(rank)

        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_SIZE": processes}
        children.append(start(words, prepare, {name: str(value) for name, value in places.items()}))
    codes = [end_of(child) for child in children]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{port}_*"))  # killed ranks leave no shared memory
    return codes


def at_batch(number, action):
    """Return a function that makes a process act once it has computed a number of micro-batches."""

    def prepare():
        compute, done = LlavaTrainer.training_step, []

        def step(self, *args, **kwargs):
            loss = compute(self, *args, **kwargs)
            done.append(loss)
            if len(done) == number:
                return action(loss)
            return loss

        LlavaTrainer.training_step = step

    return prepare


def killed_at(number):
    return at_batch(number, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def signalled_at(number, name):
    def send(loss):
        os.kill(os.getpid(), name)
        return loss

    return at_batch(number, send)


def log(output):
    """Step, loss, gradient norm and learning rate of each logged step."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line]


def weights(directory):
    if (directory / "adapter_model.safetensors").exists():
        tensors = dict(open_tensor_file(directory / "adapter_model.safetensors"))
        return tensors | dict(open_tensor_file(directory / "non_lora_trainables.bin"))
    return dict(open_weights(directory))


def assert_same_run(one, two):
    assert log(one) == log(two)
    left, right = weights(one), weights(two)
    assert sorted(left) == sorted(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


VARIANTS = {
    "lora": [*LORA],
    "lora, by modality, workers that stay, logged every third step": [
        *[*LORA, "--group_by_modality_length", "True", "--dataloader_num_workers", "1"],
        *["--dataloader_persistent_workers", "True", "--logging_steps", "3"],
    ],
    "full, bf16, checkpointed": [
        "--bf16",
        "True",
        "--gradient_checkpointing",
        "True",
        "--warmup_ratio",
        "0.3",
    ],
}


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, marks=[pytest.mark.slow] * ("," in name), id=name) for name, flags in VARIANTS.items()],
)
def test_killed_at_every_step_equals_not_killed(command, tmp_path, flags):
    """Nine rows, two a step, two epochs: ten steps, each ended by a kill in the middle of the next one."""
    assert run(command(tmp_path / "uninterrupted", *flags)) == 0
    words = command(tmp_path / "killed", *flags, *SAVED)
    for step in range(1, 10):
        half_a_step_later = 2 if step == 5 else 3  # the fifth step of an epoch has one batch
        assert run(words, killed_at(half_a_step_later)) == KILLED
        assert list(list_checkpoints(tmp_path / "killed")) == [step - 1, step][step == 1 :], step
    assert run(words) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")


def test_a_signal_ends_the_run_saved(command, tmp_path, capfd):
    assert run(command(tmp_path / "uninterrupted", *LORA)) == 0
    words = command(tmp_path / "stopped", *LORA)
    for number, name, code in [(3, signal.SIGTERM, 143), (2, signal.SIGUSR1, 138), (3, signal.SIGINT, 130)]:
        capfd.readouterr()
        assert run(words, signalled_at(number, name)) == code
        step = max(list_checkpoints(tmp_path / "stopped"))
        message = capfd.readouterr().err
        assert f"{name.name}: saving after this step; send it again to end at once\n" in message
        place = tmp_path / "stopped" / f"checkpoint-{step}"
        assert f"stopped by {name.name} after step {step}; {place} is saved; run the same command again" in message
        assert not (tmp_path / "stopped" / "config.json").exists()
    assert list(list_checkpoints(tmp_path / "stopped")) == [2, 3, 5]
    assert run(words) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_a_signal_saves_a_resumable_checkpoint_despite_save_only_model(command, tmp_path):
    words = command(tmp_path / "out", *LORA, *SAVED, "--save_only_model", "True")
    assert run(words, signalled_at(4, signal.SIGTERM)) == 143
    assert [(path / "optimizer.pt").exists() for path in list_checkpoints(tmp_path / "out").values()] == [False, True]
    assert newest_valid(tmp_path / "out").name == "checkpoint-2"


def test_a_second_signal_ends_it_at_once(command, tmp_path, monkeypatch):
    def send_twice(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr("llava.train.fault_tolerance.signals._SAME_REQUEST", -1.0)
    assert run(command(tmp_path / "out", *LORA, *SAVED), at_batch(3, send_twice)) == -signal.SIGTERM
    assert list(list_checkpoints(tmp_path / "out")) == [1]


def nan_loss(loss):
    return loss * float("nan")


def nan_gradient(loss):
    return loss + (loss * 0).sqrt()  # the same value


def nan_at(number, make_nan=nan_loss):
    """Make the loss of a micro-batch, or its gradient alone, NaN."""

    def prepare():
        compute, done = Trainer.compute_loss, []

        def compute_nan(self, *args, **kwargs):
            loss = compute(self, *args, **kwargs)
            done.append(None)
            return make_nan(loss) if len(done) == number else loss

        Trainer.compute_loss = compute_nan

    return prepare


@pytest.mark.parametrize("flags", [[], ["--max_grad_norm", "0"]], ids=["clipped", "not clipped"])
def test_a_non_finite_loss_stops_the_run_before_its_update(command, tmp_path, capfd, flags):
    """The fault is the machine's here: the same command resumes as if nothing had happened."""
    assert run(command(tmp_path / "uninterrupted", *LORA, *flags)) == 0
    words = command(tmp_path / "out", *LORA, *flags)
    for batch, step in [(3, 2), (8, 6)]:  # the first batch of the second step, and of the second epoch
        capfd.readouterr()
        assert run(words, nan_at(batch)) == 1
        message = capfd.readouterr().err.splitlines()[-1]
        assert message.startswith(f"error: step {step}: the loss is nan, the gradient's norm "), message
        report = json.loads((tmp_path / "out" / f"nonfinite_step_{step}.json").read_text())
        assert report["step"] == step
        (bad,) = report["batches"]
        assert (bad["process"], bad["loss"], len(bad["rows"])) == (0, "nan", 1)
        (found,) = bad["rows"]
        assert f"What number is {found['row']}? ASSISTANT:[[it is {found['row']}</s>]]" in found["text"]
        assert f"on rows {found['row']} (" in message
        assert f"{tmp_path / 'out' / f'checkpoint-{step - 1}'} holds the state before it" in message
        assert list(list_checkpoints(tmp_path / "out"))[-1] == step - 1
    assert run(words) == 0
    assert_same_run(tmp_path / "out", tmp_path / "uninterrupted")


ZERO2 = ["--deepspeed", "scripts/zero2.json"]
TOGETHER = {"DDP": [], "ZeRO-2": ZERO2}
SHARED = [row(index, IMAGES[index // 2]) for index in range(9)]
TEXT_FIRST = [row(0), *ROWS[:6], row(7), row(8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rows"),
    [([], ROWS), (ZERO2, ROWS), ([], SHARED)],
    ids=["DDP", "ZeRO-2", "DDP, two rows an image"],
)
def test_two_ranks_killed_equal_two_that_were_not(command, tmp_path, monkeypatch, flags, rows):
    """Nine rows for two processes: three steps an epoch, the last of one batch each."""
    monkeypatch.chdir(ROOT)
    flags = [*LORA, *flags]
    assert run_together(command(tmp_path / "uninterrupted", *flags, rows=rows)) == [0, 0]
    words = command(tmp_path / "killed", *flags, *SAVED, rows=rows)
    for step, batches in enumerate([3, 3, 2, 3, 3], start=1):
        assert run_together(words, lambda rank: killed_at(batches)()) == [KILLED, KILLED]  # noqa: B023
        assert list(list_checkpoints(tmp_path / "killed"))[-1] == step
    assert run_together(words) == [0, 0]
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("flags", TOGETHER.values(), ids=TOGETHER)
def test_a_signal_to_one_process_ends_both_saved(command, tmp_path, monkeypatch, capfd, flags):
    monkeypatch.chdir(ROOT)
    words = command(tmp_path / "out", *LORA, *flags)
    before = {0: lambda: None, 1: signalled_at(3, signal.SIGTERM)}
    assert run_together(words, lambda rank: before[rank]()) == [143, 143]
    assert list(list_checkpoints(tmp_path / "out")) == [2]
    assert "stopped by SIGTERM after step 2; " in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["DDP", "zero2", "zero3"])
def test_a_bad_loss_on_one_process_stops_both(command, tmp_path, monkeypatch, capfd, stage):
    monkeypatch.chdir(ROOT)
    flags = [] if stage == "DDP" else ["--deepspeed", f"scripts/{stage}.json"]
    words = command(tmp_path / "out", *LORA, *flags)
    before = {0: lambda: None, 1: nan_at(4)}
    assert run_together(words, lambda rank: before[rank]()) == [1, 1]
    assert list(list_checkpoints(tmp_path / "out")) == [1]
    (bad,) = json.loads((tmp_path / "out" / "nonfinite_step_2.json").read_text())["batches"]
    assert (bad["process"], bad["loss"], len(bad["rows"])) == (1, "nan", 1)
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss is nan")
    assert f"on rows {bad['rows'][0]['row']} (" in message
    assert message.count("checkpoint-1 holds the state before it") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["DDP", "zero2", "zero3"])
def test_a_bad_gradient_on_one_process_stops_both(command, tmp_path, monkeypatch, capfd, stage):
    """Once: the same command resumes as if nothing had happened."""
    monkeypatch.chdir(ROOT)
    flags = [] if stage == "DDP" else ["--deepspeed", f"scripts/{stage}.json"]
    words = command(tmp_path / "out", *LORA, *flags)
    before = {0: lambda: None, 1: nan_at(4, nan_gradient)}
    assert run_together(words, lambda rank: before[rank]()) == [1, 1]
    report = json.loads((tmp_path / "out" / "nonfinite_step_2.json").read_text())
    assert report["grad_norm"] in ("nan", "inf")
    assert sorted(batch["process"] for batch in report["batches"]) == [0, 0, 1, 1]
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss is ")
    assert f"the gradient's norm {report['grad_norm']}, on rows " in message
    assert f"{tmp_path / 'out' / 'checkpoint-1'} holds the state before it" in message
    assert list(list_checkpoints(tmp_path / "out")) == [1]
    if stage == "zero2":
        assert run_together(command(tmp_path / "uninterrupted", *LORA, *flags)) == [0, 0]
        assert run_together(words) == [0, 0]
        assert_same_run(tmp_path / "out", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_the_overfit_check_changes_nothing(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    flags = [*LORA, *ZERO2, "--bf16", "True", "--max_steps", "2", "--gradient_checkpointing", "True"]
    assert run_together(command(tmp_path / "without", *flags)) == [0, 0]
    assert run_together(command(tmp_path / "with", *flags, "--sanity_check", "4")) == [0, 0]
    assert_same_run(tmp_path / "with", tmp_path / "without")


MIXED = [row(index, IMAGES[index // 2] if index % 2 else None) for index in range(12)]
ONE, TWO = ["--per_device_train_batch_size", "1"], ["--per_device_train_batch_size", "2"]
HALVES = [
    *ONE,
    "--gradient_accumulation_steps",
    "2",
]  # the first process has even rows, of text alone, the other images
DIVISIONS = {
    "accumulated": (1, [*ONE, "--gradient_accumulation_steps", "4"]),
    "DDP": (2, TWO),
    "DDP, one has text alone": (2, HALVES),
    "ZeRO-2, one has text alone": (2, [*HALVES, "--deepspeed", "scripts/zero2.json"]),
    "ZeRO-3, one has text alone": (2, [*HALVES, "--deepspeed", "scripts/zero3.json"]),
}


@pytest.mark.slow
def test_four_rows_a_step_are_the_same_however_they_are_divided(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [*LORA, "--lora_dropout", "0", "--train_sampling_strategy", "sequential", "--num_train_epochs", "1"]
    whole = [*flags, "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "4"]
    assert run(command(tmp_path / "uninterrupted", *whole, rows=MIXED)) == 0
    steps, losses, norms, _ = zip(*log(tmp_path / "uninterrupted"), strict=True)
    assert steps == (1, 2, 3)
    for name, (processes, division) in DIVISIONS.items():
        words = command(tmp_path / name, *flags, "--gradient_accumulation_steps", "1", *division, rows=MIXED)
        assert run_together(words, processes=processes) == [0] * processes, name
        found_steps, found_losses, found_norms, _ = zip(*log(tmp_path / name), strict=True)
        assert found_steps == steps
        assert found_losses == pytest.approx(losses, rel=1e-6), name
        assert found_norms == pytest.approx(norms, rel=1e-5), name
