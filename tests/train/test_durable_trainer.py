"""What the trainer does around a checkpoint: where it is filled, the best one's name, what goes to the hub."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from llava.train.arguments import TrainingArguments
from llava.train.checkpoints import numbered, verify
from llava.train.durable_trainer import DurableTrainer
from llava.train.guards import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore")


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
    """y = a x; `rate` below zero lets the loss rise."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x, labels):
        return {"loss": ((self.slope * x - labels) ** 2).mean()}


ROWS = [{"x": torch.tensor([1.0]), "labels": torch.tensor([0.0])} for _ in range(4)]


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
        return DurableTrainer(model=Line(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:2], data_collator=collate)

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


def test_an_update_that_leaves_itself_out_is_not_waited_for(build, monkeypatch):
    trainer = build(save_strategy="no", logging_strategy="no", max_steps=3, optim="adamw_torch_fused")
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            seen.append(("before the update", reads.times - self.start))

        def on_step_begin(self, *_, **__):
            self.start = reads.times

    trainer.add_callback(Watch())
    with Reads(monkeypatch) as reads:
        trainer.train()
    assert seen == [("before the update", 0)] * 3
    assert reads.times >= 3


def test_no_step_looks_for_what_learns(build, monkeypatch):
    trainer = build(save_strategy="no", logging_strategy="no", max_steps=3)
    walks, seen = [], []
    look = nn.Module.named_modules

    def count(module, *args, **kwargs):
        walks.append(module)
        return look(module, *args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            assert trainer.model.slope.grad is None
            seen.append(len(walks))

    trainer.add_callback(Watch())
    monkeypatch.setattr(nn.Module, "named_modules", count)
    trainer.train()
    assert len(seen) == 3
    assert seen[1] == seen[2]  # the first step's clipping looks at the kinds of gradients


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


def test_a_checkpoint_is_filled_in_a_hidden_place(build, tmp_path, monkeypatch):
    save, seen = Trainer._save_rng_state, []

    def look(self, output_dir):
        save(self, output_dir)
        seen.append(sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").iterdir()))

    monkeypatch.setattr(Trainer, "_save_rng_state", look)
    build(max_steps=2).train()
    assert seen == [[".checkpoint-1.writing"], [".checkpoint-2.writing", "checkpoint-1"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_checkpoint_is_named_by_its_place_and_stays(build, tmp_path, monkeypatch, limit):
    """AdamW's steps of 0.3 lead from 1 over 0 on to the other side: the fourth is worse than the third."""
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    flags = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = build(**flags, save_total_limit=limit, load_best_model_at_end=True)
    saved = []
    rotate = DurableTrainer._save_checkpoint

    def save(self, model, trial):
        rotate(self, model, trial)
        path = tmp_path / "out" / f"checkpoint-{self.state.global_step}"
        saved.append(json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"])
        assert verify(path)
        assert Path(self.state.best_model_checkpoint).is_dir()

    monkeypatch.setattr(DurableTrainer, "_save_checkpoint", save)
    trainer.train()
    out = tmp_path / "out"
    assert saved == [str(out / f"checkpoint-{step}") for step in (1, 2, 3, 3)]
    # at the end transformers removes what is not the best where one alone may stay
    assert list(numbered(out)) == {None: [1, 2, 3, 4], 1: [3], 2: [3, 4]}[limit]


def test_the_hub_gets_what_is_in_place(build, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, path: pushed.append((path, verify(Path(path)))))
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = build(max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "out" / f"checkpoint-{step}"), True) for step in (1, 2)]


def test_another_error_keeps_its_name(build, tmp_path, monkeypatch):
    def fail(self, output_dir):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        build().train()
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_have_numbers_where_nobody_describes_them(build):
    assert build().describe_row(3) == {"row": 3}
