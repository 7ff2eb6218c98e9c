"""Non-finite guard: a NaN or infinite loss or gradient stops a run before the update, and its rows are named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.files.atomic_files import atomic_write
from llava.train.distributed import gather_objects, max_over_ranks
from llava.train.fault_tolerance import rng_state
from llava.train.fault_tolerance.checkpoint_writer import CheckpointWriter
from llava.train.fault_tolerance.loss_scaling import SkippedUpdates
from llava.train.output_files import NONFINITE_FILE

ROW_KEY = "dataset_rows"
_SHOWN_ROWS = 16


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; the message says at which step, and where the rows are listed."""


@dataclasses.dataclass
class MicroBatch:
    """Input of one forward pass.

    Attributes:
        rows: indices into the training data.
        loss: scalar, detached; None until computed.
    """

    rows: list[int]
    loss: Tensor | None = None


class StepGuard(TrainerCallback):
    """Stops a run whose loss or gradient is not finite, before the update, and saves the state before that step.

    Args:
        trainer: asks for `check` between the gradient and the update.
        writer: of the trainer's checkpoints.
        describe_row: what the report shows of a row of the training data.
    """

    def __init__(
        self, trainer: Trainer, writer: CheckpointWriter, describe_row: Callable[[int], dict[str, Any]]
    ) -> None:
        self.trainer, self.writer, self.describe_row = trainer, writer, describe_row
        self._batches: list[MicroBatch] = []
        self._first_step = 0
        self._rng: rng_state.RngState | None = None  # before the step
        self._unlogged_loss: Tensor | None = None  # before the step
        self._is_epochs_first = False
        self._skipped = SkippedUpdates(trainer.accelerator)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step at which this run begins; `auto_find_batch_size` begins again after an out-of-memory error."""
        self._first_step, self._batches = state.global_step, []
        self._skipped = SkippedUpdates(self.trainer.accelerator)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the random generators: the epoch's data loader draws from them, and a resumed run starts it again."""
        self._rng = rng_state.capture()
        self._is_epochs_first = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what a stop in this step goes back to."""
        if not self._is_epochs_first:
            self._rng = rng_state.capture()
        self._is_epochs_first = False
        self._unlogged_loss = self.writer.unlogged_loss.clone()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the updates that fp16's loss scaling skips."""
        if args.fp16:
            self._skipped.note(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log how many updates were skipped."""
        self._skipped.log_total()

    def start_batch(self, rows: list[int]) -> None:
        """Note the rows of the micro-batch that comes."""
        self._batches.append(MicroBatch(rows))

    def note_loss(self, loss: Tensor) -> None:
        """Note the loss of the last micro-batch; the device is not waited for."""
        self._batches[-1].loss = loss

    def check_loss(self, loss: Tensor) -> None:
        """Stop all ranks if the last micro-batch's loss is not finite on one of them.

        Raises:
            NonFiniteError: after saving the state before this step.
        """
        self.note_loss(loss)
        if max_over_ranks([is_non_finite(self._batches[-1:], None)], self.trainer.args.device)[0]:
            self._stop(None)

    def check(self, grad_norm: Tensor | float | None, received_signal: int) -> int:
        """Stop all ranks if a loss or the gradient is not finite on one of them; waits for the device once.

        The loss scaling of fp16 meets infinite gradients in its search and skips those steps itself, so there gradients
        count only if it skips step after step.

        Args:
            grad_norm: of this step's gradient.
            received_signal: number of the signal that this rank got, 0 for none.

        Returns:
            the largest signal number of all ranks, which travels with the flag.

        Raises:
            NonFiniteError: after saving the state before this step.
        """
        is_bad = is_non_finite(self._batches, None if self.trainer.args.fp16 else grad_norm)
        is_bad = is_bad | self._skipped.are_endless
        bad, signal = max_over_ranks([is_bad, received_signal], self.trainer.args.device)
        if bad:
            self._stop(grad_norm)
        self._batches = []
        return int(signal)

    def _stop(self, grad_norm: Tensor | float | None) -> NoReturn:
        args, step = self.trainer.args, self.trainer.state.global_step + 1
        mine = describe_batches(self._batches, args.process_index, self.describe_row)
        batches = only_non_finite([batch for described in gather_objects(mine) for batch in described])
        report = Path(args.output_dir) / NONFINITE_FILE.format(step)
        saved = self._save_state_before(grad_norm)
        if self.trainer.is_world_process_zero():
            write_report(report, step, grad_norm, batches)
        raise NonFiniteError(describe_stop(step, grad_norm, batches, report, saved, self._skipped.in_a_row))

    def _save_state_before(self, grad_norm: Tensor | float | None) -> Path | None:
        """Save the state before the step, unless a checkpoint holds it; return that checkpoint, None if it is lost."""
        trainer, target = self.trainer, self.writer.target
        if trainer.state.global_step == self._first_step:
            return self.writer.resumed_from
        if gather_objects(target.is_dir())[0]:
            return target
        came_with_update = trainer.is_deepspeed_enabled and grad_norm is not None
        if came_with_update and not trainer.accelerator.optimizer_step_was_skipped:
            return None
        rng_state.restore(self._rng)
        self.writer.unlogged_loss.set(self._unlogged_loss)
        trainer.args.save_only_model = False
        trainer._save_checkpoint(trainer.model, None)
        return target


class NumberedRow(NamedTuple):
    """A row of a dataset and its index there."""

    number: int
    row: Any


class NumberedRows(Dataset):
    """A dataset whose rows carry their index, so that a batch can be named."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[NumberedRow]:
        """Return a batch's rows, read together where the dataset does that; torch's loader calls it."""
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[index] for index in indices]
        return [NumberedRow(index, row) for index, row in zip(indices, rows, strict=True)]


class NumberedCollator:
    """A collator that leaves the rows' indices in the batch, as a list; rows without are collated as they are."""

    def __init__(self, collator: Callable) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the collator's batch, with `ROW_KEY` if the rows are of `NumberedRows`."""
        numbers = [row.number for row in rows if isinstance(row, NumberedRow)]
        plain = [row.row if isinstance(row, NumberedRow) else row for row in rows]
        return {**self.collator(plain), **({ROW_KEY: numbers} if numbers else {})}


def is_non_finite(batches: Sequence[MicroBatch], grad_norm: Tensor | float | None) -> Tensor | bool:
    """Tell whether a loss or the gradient's norm is NaN or infinite; a tensor does not wait for the device."""
    values = [batch.loss.float() for batch in batches if batch.loss is not None]
    if isinstance(grad_norm, Tensor):
        norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).detach().float()  # FSDP's
        values.append(norm.to(values[0].device) if values else norm)
    elif grad_norm is not None and not math.isfinite(grad_norm):
        return True
    if not values:
        return False
    return ~torch.stack([value.reshape(()) for value in values]).isfinite().all()


def describe_batches(
    batches: Sequence[MicroBatch], rank: int, describe_row: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the micro-batches whose loss is not finite, or all of them if the losses are; for `write_report`."""
    found = [(batch, float(batch.loss)) for batch in batches if batch.loss is not None]
    bad = [(batch, loss) for batch, loss in found if not math.isfinite(loss)]
    return [
        {"process": rank, "loss": str(loss), "rows": [describe_row(row) for row in batch.rows]}
        for batch, loss in bad or found
    ]


def only_non_finite(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the described micro-batches whose loss is not finite, or all if there are none."""
    return [batch for batch in batches if not math.isfinite(float(batch["loss"]))] or list(batches)


def write_report(path: Path, step: int, grad_norm: Tensor | float | None, batches: Sequence[dict[str, Any]]) -> None:
    """Write the step, the norm of its gradient and the rows it was computed on, as JSON."""
    norm = None if grad_norm is None else str(float(grad_norm))
    with atomic_write(path) as stream:
        json.dump({"step": step, "grad_norm": norm, "batches": list(batches)}, stream, indent=1, ensure_ascii=False)


def describe_stop(
    step: int,
    grad_norm: Tensor | float | None,
    batches: Sequence[dict[str, Any]],
    report: Path,
    saved: Path | None,
    skipped: int = 0,
) -> str:
    """Return why a run stopped, on which rows, and how to go on; `skipped` updates in a row came before."""
    rows = [str(row["row"]) for batch in batches for row in batch["rows"]]
    losses = ", ".join(sorted({batch["loss"] for batch in batches}))
    norm = "" if grad_norm is None else f", the gradient's norm {float(grad_norm)}"
    norm += f" after {skipped} updates in a row that fp16 loss scaling skipped" if skipped else ""
    shown = ", ".join(rows[:_SHOWN_ROWS]) + (f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else "")
    state = f"{saved} holds the state before it" if saved else "no checkpoint holds the state before it"
    return (
        f"step {step}: the loss is {losses}{norm}, on rows {shown} ({report} shows them); {state}; fix or leave out "
        "these rows, or lower --learning_rate"
    )
