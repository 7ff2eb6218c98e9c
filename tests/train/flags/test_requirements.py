"""Flags whose packages, settings or services are missing are refused before data and weights are read."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from types import SimpleNamespace

import pytest
from transformers import Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK

from llava.train import recipe, train
from llava.train.flags import requirements
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.requirements import _REPORTING_PACKAGES, refuse_dropping_all, refuse_missing_launcher

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True"]


def parse(*words):
    return parse_arguments([*NEEDED, *words])[2]


def refusal(*words):
    with pytest.raises(ValueError) as caught:
        parse(*words)
    return str(caught.value)


@pytest.fixture
def nothing_installed(monkeypatch):
    """Hide the packages of all integrations."""
    hidden = {module for modules, _ in _REPORTING_PACKAGES.values() for module in modules}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


@pytest.mark.parametrize("name", sorted(_REPORTING_PACKAGES))
def test_an_integration_without_its_package(nothing_installed, name):
    package = _REPORTING_PACKAGES[name][1]
    assert refusal("--report_to", name) == (
        f"--report_to {name} needs a package; run: pip install {package}, or pass --report_to none, everything is "
        "logged to train_log.jsonl anyway"
    )


def test_every_integration_that_needs_a_package_is_in_the_table():
    assert set(_REPORTING_PACKAGES) <= set(INTEGRATION_TO_CALLBACK)
    assert set(INTEGRATION_TO_CALLBACK) - set(_REPORTING_PACKAGES) <= {"kubeflow"}


def test_the_program_ends_before_data_and_weights(nothing_installed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipe, "run_training", lambda *arguments: pytest.fail("began to work"))
    words = ["--output_dir", str(tmp_path / "out"), "--data_path", str(tmp_path / "absent.json")]
    assert train.main([*words, "--use_cpu", "True", "--report_to", "wandb"]) == 2
    assert capsys.readouterr().err.startswith("error: --report_to wandb needs a package; run: pip install wandb")
    assert not list(tmp_path.iterdir())


def test_an_integration_that_fails_when_it_starts(monkeypatch):
    def fail():
        raise RuntimeError("it needs\n  an address.")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "kubeflow", fail)
    assert refusal("--report_to", "kubeflow").startswith(
        "--report_to kubeflow can't be used here (it needs an address); or pass --report_to none"
    )


def test_none_all_several_and_unknown(monkeypatch, caplog):
    for name in ("tensorboard", "kubeflow"):
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, object)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(name, *rest) or object())
    assert parse().report_to == parse("--report_to", "none").report_to == []
    assert parse("--report_to", "tensorboard", "kubeflow").report_to == ["tensorboard", "kubeflow"]
    for alone in ("none", "all"):
        message = refusal("--report_to", "tensorboard", alone)
        assert message == f"--report_to tensorboard {alone}: {alone} stands alone; leave it or the others out"
    message = refusal("--report_to", "wandb,tensorboard")
    assert message.startswith("--report_to wandb,tensorboard is unknown; choose none, all (whatever is installed), or ")
    assert message.endswith(", trackio, wandb, with spaces between them")


@pytest.mark.parametrize(("installed", "said"), [(["tensorboard"], "tensorboard"), ([], "nothing is installed")])
def test_report_to_all_logs_what_is_installed(monkeypatch, caplog, installed, said):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: list(installed))
    monkeypatch.setattr(requirements, "_check_reporting", lambda names: None)
    with caplog.at_level(logging.INFO, "llava"):
        assert parse("--report_to", "all").report_to == installed
    assert f"--report_to all: {said}" in caplog.text


def test_an_optimizer_without_its_package(monkeypatch):
    def fail(args, model=None):
        raise ImportError("Install it with `pip install lomo-optim`.")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", fail)
    assert refusal("--optim", "lomo", "--optim_args", "a=1") == (
        "--optim lomo with --optim_args a=1 can't be used here (Install it with `pip install lomo-optim`); or leave "
        "it out"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "sgd", "--optim_args", "foo"], "--optim sgd with --optim_args foo can't be used here ("),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr"],
            """); pass --lr_scheduler_kwargs '{"min_lr": 1e-6}'""",
        ),
        (
            ["--lr_scheduler_type", "warmup_stable_decay"],
            """); pass --lr_scheduler_kwargs '{"num_decay_steps": 100}'""",
        ),
        (
            ["--lr_scheduler_kwargs", '{"foo": 1}'],
            "unexpected keyword argument 'foo'); change or leave out --lr_scheduler_kwargs",
        ),
        (["--torch_compile_backend", "gcc"], "--torch_compile_backend gcc: choose one of "),
        (
            ["--lr_scheduler_kwargs", "min_lr=1"],
            "--lr_scheduler_kwargs min_lr=1 is not a JSON object; give text like '{",
        ),
        (["--lr_scheduler_kwargs", "{1"], "--lr_scheduler_kwargs {1 can't be read (Expecting property name"),
        (
            ["--gradient_checkpointing_kwargs", "x.json"],
            "--gradient_checkpointing_kwargs x.json is not a JSON object; give",
        ),
        (["--accelerator_config", "absent.json"], "--accelerator_config absent.json can't be read ([Errno 2] No such"),
        (["--accelerator_config", '{"foo": 1}'], "--accelerator_config has no foo; choose among split_batches, "),
        (
            ["--fsdp_config", "absent.json"],
            "--fsdp_config absent.json can't be read ([Errno 2] No such file or directory",
        ),
        (["--deepspeed", '{"a": 1}'], '--deepspeed {"a": 1} has no zero_optimization; use scripts/zero2.json'),
        (["--deepspeed", "{"], "--deepspeed { can't be read (Expecting property name"),
        (["--deepspeed", "list.json"], "--deepspeed list.json holds no JSON object; use scripts/zero2.json"),
        (["--deepspeed", "utf16.json"], "--deepspeed utf16.json can't be read ('utf-8' codec can't decode"),
        (
            ["--deepspeed", '{"zero_optimization": {"stage": "2"}}'],
            "has the stage '2'; choose 0, 1, 2 or 3, as scripts/zero2.json",
        ),
        (
            ["--deepspeed", '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}'],
            'has "cpu" under zero_optimization.offload_optimizer; write an object there, such as {"device": "cpu"}, or',
        ),
        (
            ["--deepspeed", '{"bf16": true, "zero_optimization": {"stage": 2}}'],
            'has true under bf16; write an object there, such as {"enabled": "auto"}, or use scripts/zero3_offload',
        ),
        (["--deepspeed", '{"zero_optimization": 2}'], "has no object under zero_optimization; use scripts/zero2.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_settings(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "utf16.json").write_text("{}", encoding="utf-16")
    assert message in refusal(*words)


def test_deepspeed_that_is_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "deepspeed" and find(name, *rest)) or None
    )
    config = json.dumps({"zero_optimization": {"stage": 2}})
    assert refusal("--deepspeed", config) == (
        f'--deepspeed {config} needs DeepSpeed; run: pip install -e ".[train]", or leave it out'
    )


def test_deepspeed_without_a_launcher(monkeypatch):
    """DeepSpeed would say that mpi4py is missing, after the data were read."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mpi4py" else find(name, *rest)
    )
    training = SimpleNamespace(deepspeed="zero2.json")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match=r"^--deepspeed zero2.json needs a launcher: start the training with deep"):
            refuse_missing_launcher(training)
    refuse_missing_launcher(SimpleNamespace(deepspeed=None))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    refuse_missing_launcher(training)


@pytest.mark.parametrize(
    ("rows", "each", "processes", "way_out"),
    [
        (31, 16, 2, "leave it out or pass --per_device_train_batch_size 15 or less"),
        (1, 1, 2, "leave it out"),
    ],
)
def test_dropping_the_last_batch_leaves_something(rows, each, processes, way_out):
    training = SimpleNamespace(train_batch_size=each, world_size=processes, dataloader_drop_last=True)
    with pytest.raises(ValueError) as caught:
        refuse_dropping_all(rows, training)
    assert str(caught.value) == (
        f"--dataloader_drop_last True leaves nothing to train on: {rows} rows are fewer than the {each * processes} of "
        f"a batch ({each} on each of {processes} process(es)); {way_out}"
    )
    refuse_dropping_all(each * processes, training)
    training.dataloader_drop_last = False
    refuse_dropping_all(rows, training)


def test_a_run_with_too_few_rows_ends_before_the_weights(train_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "load_model", lambda *arguments: pytest.fail("loaded the weights"))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing"}]
    flags = ["--dataloader_drop_last", "True", "--per_device_train_batch_size", "2"]
    assert train_tiny(tmp_path / "out", [{"id": "1", "conversations": turns}], *flags) == 1
    assert "1 rows are fewer than the 2 of a batch (2 on each of 1 process(es))" in capsys.readouterr().err


def test_the_log_directory_reaches_tensorboard(monkeypatch, caplog):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe.choose_log_directory(parse())
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    recipe.choose_log_directory(SimpleNamespace(logging_dir="logs", report_to=["tensorboard"]))
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    assert not caplog.text
    recipe.choose_log_directory(SimpleNamespace(logging_dir="logs", report_to=[]))
    assert "--logging_dir logs has no effect without --report_to tensorboard" in caplog.text
