"""One wait for the device in a step, no bad update; where a checkpoint is filled, the best one, the hub."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from llava.train.fault_tolerance.checkpoint_dir import list_checkpoints, verify
from llava.train.fault_tolerance.nonfinite import NonFiniteError
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.trainer import LlavaTrainer


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a program waits on other devices."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.times = 0
        as_list = torch.Tensor.tolist

        def count(tensor):
            self.times += 1
            return as_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", count)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.times += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(options or {}))


class Line(nn.Module):
    """y = slope * x."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([1.0]))

    def forward(self, input_ids, labels):
        return {"loss": ((self.slope * input_ids - labels) ** 2).mean()}

    def num_parameters(self, exclude_embeddings):
        return 1


class Saver:
    """Saves nothing; `save` and `restore` can be watched."""

    def gather(self):
        return {}

    def save(self, state, directory, *, is_result):
        pass

    def restore(self, directory):
        pass


class Evaluator:
    """Measures the square of the slope."""

    rows = ()

    def measure(self, model, rank, world_size):
        return {"loss": model.slope.item() ** 2}


ROWS = [{"input_ids": torch.tensor([1.0]), "labels": torch.tensor([0.0])} for _ in range(4)]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def build(tmp_path):
    def trainer(**flags):
        flags = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3, **flags}
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{"per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "constant", **flags},
        )
        trainer = LlavaTrainer(
            Line(), args, saver=Saver(), train_dataset=ROWS, data_collator=collate, evaluator=Evaluator()
        )
        trainer.step_guard.describe_row = lambda row: {"row": row}
        return trainer

    return trainer


def test_a_step_waits_for_the_device_once(build, monkeypatch):
    trainer = build(save_strategy="no", logging_strategy="no", max_steps=3)
    trainer.create_optimizer = lambda model=None: None
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)  # AdamW on a CPU reads its count of steps
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(reads.times)

    trainer.add_callback(Watch())
    with Reads(monkeypatch) as reads:
        trainer.train()
    assert [after - before for before, after in pairwise(seen)] == [1, 1]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_bad_step_changes_nothing(build, optimizer):
    trainer = build(save_strategy="no", optim=optimizer)
    states = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, *_, **__):
            inner = trainer.optimizer.optimizer
            states.append([*map(torch.clone, tensors(trainer.model.state_dict(), inner.state_dict()["state"]))])
            if state.global_step == 2:
                trainer.model.slope.register_hook(lambda gradient: gradient * torch.nan)

    trainer.add_callback(Watch())
    with pytest.raises(NonFiniteError, match=r"step 3: .* gradient's norm nan"):
        trainer.train()
    after = tensors(trainer.model.state_dict(), trainer.optimizer.optimizer.state_dict()["state"])
    assert len(states) == 3
    for one, other in zip(after, states[-1], strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in zip(states[-1], states[-2], strict=True))


def tensors(*states):
    """All tensors of nested dictionaries."""
    for state in states:
        for value in state.values():
            if isinstance(value, dict):
                yield from tensors(value)
            elif isinstance(value, torch.Tensor):
                yield value


def test_batches_are_copied_while_the_device_works_where_memory_is_pinned(build):
    assert build().args.accelerator_config.non_blocking is False
    assert build(accelerator_config={"non_blocking": True}).args.accelerator_config.non_blocking is True


def test_a_checkpoint_is_filled_in_a_hidden_directory(build, tmp_path):
    trainer, seen = build(max_steps=2), []

    def look(state, directory, *, is_result):
        seen.append(sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").iterdir()))

    trainer.saver.save = look
    trainer.train()
    assert seen == [[".checkpoint-1.writing"], [".checkpoint-2.writing", "checkpoint-1"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert trainer.args.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_checkpoint_is_named_by_its_place_and_stays(build, tmp_path, limit):
    """AdamW's steps of 0.3 lead from 1 over 0 on to the other side: the fourth is worse than the third."""
    flags = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = build(**flags, save_total_limit=limit, load_best_model_at_end=True)
    out, saved, restored = tmp_path / "out", [], []

    class Watch(TrainerCallback):
        def on_save(self, args, state, *_, **__):
            path = out / f"checkpoint-{state.global_step}"
            saved.append(json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"])
            assert verify(path)
            assert Path(state.best_model_checkpoint).is_dir()

    trainer.add_callback(Watch())
    trainer.saver.restore = restored.append
    trainer.train()
    assert saved == [str(out / f"checkpoint-{step}") for step in (1, 2, 3, 3)]
    assert restored == [out / "checkpoint-3"]
    # at the end transformers removes what is not the best where one alone may stay
    assert list(list_checkpoints(out)) == {None: [1, 2, 3, 4], 1: [3], 2: [3, 4]}[limit]


def test_another_error_keeps_its_name(build, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    trainer = build()
    trainer.saver.save = fail
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        trainer.train()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_finished_run_resumes_without_a_further_step(build, tmp_path):
    build(max_steps=2).train()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    trainer = build(max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert (trainer.state.global_step, trainer.model.slope.item()) == (2, 1.0)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written
