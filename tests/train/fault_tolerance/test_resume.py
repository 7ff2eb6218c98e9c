"""Where a run resumes: damaged checkpoints, other flags or directories, a full disk; and the overfit check."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.train.fault_tolerance.checkpoint_dir import list_checkpoints, verify
from llava.train.fault_tolerance.resume import cut_log, find_resume_point
from llava.train.flags.command_line import parse_arguments
from llava.train.train import main

ANSWERS = ["yes", "no", "two", "red", "a dog"]
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.3"]
SAVED = [*LORA, "--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def train(goldens, tmp_path_factory):
    """Return the function (output directory, *flags, answers=) -> exit code of a run of five steps on text alone."""

    def run(output, *flags, answers=ANSWERS):
        data = tmp_path_factory.mktemp("data") / "data.json"
        turns = [[{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer}] for answer in answers]
        data.write_text(json.dumps([{"id": index, "conversations": both} for index, both in enumerate(turns)]))
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", data, "--output_dir", output]
        words += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "1", "--num_train_epochs", "1", "--learning_rate", "1e-3", *flags]
        return main([str(word) for word in words])

    return run


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert train(output, *SAVED) == 0
    assert list(list_checkpoints(output)) == [1, 2, 3, 4, 5]
    return output


@pytest.fixture
def out(uninterrupted, tmp_path):
    """A copy of the run as it was when three steps were done."""
    for step in (1, 2, 3):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    shutil.copyfile(uninterrupted / "train_log.jsonl", tmp_path / "out" / "train_log.jsonl")
    return tmp_path / "out"


def adapter(directory):
    return dict(open_tensor_file(directory / "adapter_model.safetensors"))


def assert_same(one, two):
    left, right = adapter(one), adapter(two)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def steps(output):
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "training.json"])
def test_a_damaged_checkpoint_is_skipped(train, uninterrupted, out, caplog, name):
    (out / "checkpoint-3" / name).write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="llava"):
        assert train(out, *SAVED) == 0
    assert any(f"checkpoint-3/{name} has 0 bytes instead of" in message for message in caplog.messages)
    assert f"resuming from {out / 'checkpoint-2'}" in caplog.messages
    assert verify(out / "checkpoint-3")
    assert_same(out, uninterrupted)
    assert steps(out) == [1, 2, 3, 4, 5]


def test_all_are_damaged(train, out, capsys):
    for step in (1, 2, 3):
        (out / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert train(out, *SAVED) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: no checkpoint of {out} can be resumed from: ")
    assert message.endswith("restore one, or start over with --resume_from_checkpoint none\n")


def test_starting_over_moves_earlier_checkpoints(train, uninterrupted, out, caplog):
    assert train(out, *SAVED, "--resume_from_checkpoint", "none") == 0
    assert (
        f"later checkpoints of {out} belong to another run; they were moved to {out / 'earlier-1'}" in caplog.messages
    )
    assert list(list_checkpoints(out / "earlier-1")) == [1, 2, 3]
    assert steps(out / "earlier-1") == steps(out) == [1, 2, 3, 4, 5]
    assert_same(out, uninterrupted)


def test_an_earlier_checkpoint_by_name_starts_a_branch(train, uninterrupted, out):
    assert train(out, *SAVED, "--resume_from_checkpoint", str(out / "checkpoint-1"), "--max_steps", "2") == 0
    assert (list(list_checkpoints(out)), list(list_checkpoints(out / "earlier-1"))) == ([1, 2], [2, 3])
    assert (steps(out), steps(out / "earlier-1")) == ([1, 2], [1, 2, 3, 4, 5])


def test_a_named_checkpoint(train, uninterrupted, out, tmp_path, capsys):
    assert train(tmp_path / "new", *SAVED, "--resume_from_checkpoint", str(out / "checkpoint-2")) == 0
    assert list(list_checkpoints(tmp_path / "new")) == [3, 4, 5]
    assert_same(tmp_path / "new", uninterrupted)
    (out / "checkpoint-2" / "scheduler.pt").unlink()
    assert train(tmp_path / "other", *SAVED, "--resume_from_checkpoint", str(out / "checkpoint-2")) == 1
    damaged = out / "checkpoint-2"
    assert capsys.readouterr().err == (
        f"error: --resume_from_checkpoint {damaged}: {damaged / 'scheduler.pt'} is missing; pass auto for the newest "
        "intact one of --output_dir, or none to start over\n"
    )
    assert train(tmp_path / "other", *SAVED, "--resume_from_checkpoint", "nowhere") == 1
    message = "error: --resume_from_checkpoint nowhere: there is no such directory; pass auto for the newest one of "
    assert capsys.readouterr().err == f"{message}--output_dir, or none to start over\n"


def test_one_of_an_older_version(train, uninterrupted, out, caplog):
    (out / "checkpoint-3" / "manifest.json").unlink()
    assert train(out, *SAVED, "--resume_from_checkpoint", "auto") == 0
    assert any("checkpoint-3 has no manifest.json (an older version wrote it)" in text for text in caplog.messages)
    assert_same(out, uninterrupted)
    assert train(out, *SAVED, "--resume_from_checkpoint", str(out / "checkpoint-3")) == 0
    assert caplog.text.count("checkpoint-3 has no manifest.json (an older version wrote it)") == 2


def test_other_data_or_flags_are_another_run(train, out, capsys):
    assert train(out, *SAVED, "--seed", "7", answers=[*ANSWERS[:4], "a cat"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {out / 'checkpoint-3'} belongs to another run: data_digest was ")
    assert "; seed was 42, now 7; pass what it was, or start over with another --output_dir or --resume_from" in message


def test_a_longer_run_with_another_rate_resumes(train, out, caplog):
    assert train(out, *SAVED, "--num_train_epochs", "2", "--learning_rate", "1e-2") == 0
    assert f"{out / 'checkpoint-3'}: num_train_epochs was 1.0, now 2.0" in caplog.messages
    assert f"{out / 'checkpoint-3'}: learning_rate 0.001 stays, 0.01 has no effect" in caplog.messages
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert len(steps(out)) == 10
    assert max(line.get("learning_rate", 0) for line in lines) <= 1e-3


def test_every_directory_holds_the_manifest(uninterrupted):
    for directory in (uninterrupted, *list_checkpoints(uninterrupted).values()):
        manifest = json.loads((directory / "training.json").read_text())
        assert sorted(manifest) == ["DataArguments", "ModelArguments", "TrainingArguments", "run", "versions"]
        assert manifest["run"]["rows_per_step"] == 1
        assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_no_room_for_the_optimizers_state(train, tmp_path, capfd):
    """The first checkpoint fits, the second doesn't: torch's own writer fails, in C++."""
    import resource

    flags = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
    assert train(tmp_path / "out", *flags, "--max_steps", "1") == 0
    assert (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").stat().st_size > 6_000_000
    capfd.readouterr()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))
        os._exit(train(tmp_path / "out", *flags, "--max_steps", "2"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    message = capfd.readouterr().err
    assert f"error: {tmp_path / 'out' / 'checkpoint-2'} can't be written (" in message
    assert "make room or choose another --output_dir, and run the same command again to go on from the" in message
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-1"]
    assert verify(tmp_path / "out" / "checkpoint-1")


def test_the_log_is_cut(tmp_path):
    path = tmp_path / "log"
    cut_log(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3, "x": 1}\n{"step": 4}\nnonsense\n[]\n{"step": 2}\n{"st')
    cut_log(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3, "x": 1}\n{"step": 2}\n'


def test_the_overfit_check_changes_nothing(train, uninterrupted, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="llava"):
        assert train(tmp_path / "out", *SAVED, "--sanity_check", "5", "--gradient_checkpointing", "True") == 0
    (line,) = [message for message in caplog.messages if message.startswith("overfit check: loss of the first batch ")]
    before, after = float(line.split()[7].rstrip(",")), float(line.split()[-1])
    assert after < before - 0.1
    assert_same(tmp_path / "out", uninterrupted)


def test_a_first_batch_whose_loss_does_not_fall(train, tmp_path, capsys):
    assert train(tmp_path / "out", *LORA, "--sanity_check", "2", "--learning_rate", "0") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: --sanity_check 2: the loss of the first batch went from ")
    assert message.endswith("in 2 steps on it alone; lower --learning_rate 0.0, take more steps, or check its rows\n")


def test_a_checkpoint_that_another_node_has(tmp_path, monkeypatch):
    arguments = parse_arguments(["--output_dir", str(tmp_path), "--data_path", "x", "--use_cpu", "True"])[2]
    monkeypatch.setattr("llava.train.fault_tolerance.resume.gather_objects", lambda _: [("out/checkpoint-7", None)])
    with pytest.raises(
        FileNotFoundError, match=r"^out/checkpoint-7 is not on this node; put --output_dir on a file sys"
    ):
        find_resume_point(arguments, "{}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sanity_check", "-1"], "--sanity_check -1: pass the number of steps, or 0"),
        (
            ["--sanity_check", "1", "--deepspeed", "scripts/zero3.json"],
            "--sanity_check needs the whole model on each",
        ),
    ],
)
def test_overfit_checks_that_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--output_dir", str(tmp_path), "--data_path", "x", "--use_cpu", "True", *flags])
