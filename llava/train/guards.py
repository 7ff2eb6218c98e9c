"""A loss or gradient that is no number stops a run before the weights take it, and the rows are named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from llava.data.handover import Batch
from llava.files import atomic_write

ROW_KEY = "dataset_rows"
_SHOWN_ROWS = 16


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; the message says at which step, and where the rows are listed."""


@dataclasses.dataclass
class MicroBatch:
    """What one forward pass was computed on.

    Attributes:
        rows: indices into the training data.
        loss: scalar, detached; None until computed.
    """

    rows: list[int]
    loss: Tensor | None = None


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
        return Batch({**self.collator(plain), **({ROW_KEY: numbers} if numbers else {})})


def agree(flags: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """Return `combine`'s values as numbers, for which it waits for the device once if they are a tensor."""
    values = combine(flags, device)
    return values.tolist() if isinstance(values, Tensor) else values


def combine(flags: Sequence[float | Tensor], device: torch.device) -> Tensor | list[float]:
    """Return the largest value of each flag over all processes; every process must call it.

    The device is not waited for. The result is a tensor (flags,) in fp32 on it; a list if there are no tensors and no
    other processes.
    """
    is_alone = not torch.distributed.is_initialized()
    if is_alone and not any(isinstance(flag, Tensor) for flag in flags):
        return [float(flag) for flag in flags]
    values = torch.stack(
        [
            # A tensor made from a number by its device is not waited for; one that is copied there is.
            torch.full((), float(flag), device=device) if not isinstance(flag, Tensor) else flag.to(device).float()
            for flag in flags
        ]
    )
    if not is_alone:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


class Arriving:
    """Values on their way from the device, which goes on meanwhile with what it is asked for behind them.

    Args:
        values: (flags,), or numbers that are there already.
    """

    def __init__(self, values: Tensor | list[float]) -> None:
        self._values, self._event = values, None
        if isinstance(values, Tensor) and values.is_cuda:
            self._values = values.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[float]:
        """Return the numbers once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist() if isinstance(self._values, Tensor) else self._values


def gather(value: object) -> list[Any]:
    """Return each process's value, in the order of their ranks; every process must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_bad_step(batches: Sequence[MicroBatch], grad_norm: Tensor | float | None) -> Tensor | bool:
    """Tell whether a loss or the gradient's norm is no number; as a tensor, so that the device is not waited for."""
    numbers = [batch.loss.float() for batch in batches if batch.loss is not None]
    if isinstance(grad_norm, Tensor):
        whole = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # FSDP's is spread
        numbers.append(whole.detach().float().to(numbers[0].device) if numbers else whole.detach().float())
    elif grad_norm is not None and not math.isfinite(grad_norm):
        return True
    if not numbers:
        return False
    return ~torch.stack([number.reshape(()) for number in numbers]).isfinite().all()


def describe_batches(
    batches: Sequence[MicroBatch], process: int, describe_row: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the batches whose loss is no number, or all of them if the losses are; for `write_report`."""
    found = [(batch, float(batch.loss)) for batch in batches if batch.loss is not None]
    bad = [(batch, loss) for batch, loss in found if not math.isfinite(loss)]
    return [
        {"process": process, "loss": str(loss), "rows": [describe_row(row) for row in batch.rows]}
        for batch, loss in bad or found
    ]


def write_report(path: Path, step: int, grad_norm: Tensor | float | None, batches: Sequence[dict[str, Any]]) -> None:
    """Write the step, the norm of its gradient and the rows it was computed on, as JSON."""
    norm = None if grad_norm is None else str(float(grad_norm))
    with atomic_write(path) as stream:
        json.dump({"step": step, "grad_norm": norm, "batches": list(batches)}, stream, indent=1, ensure_ascii=False)


def only_bad(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of `describe_batches` whose loss is no number, or all if there are none."""
    return [batch for batch in batches if not math.isfinite(float(batch["loss"]))] or list(batches)


def describe_stop(
    step: int, grad_norm: Tensor | float | None, batches: Sequence[dict[str, Any]], report: Path, kept: Path | None
) -> str:
    """Return why a run stopped, on which rows, and how to go on."""
    rows = [str(row["row"]) for batch in batches for row in batch["rows"]]
    losses = ", ".join(sorted({batch["loss"] for batch in batches}))
    norm = "" if grad_norm is None else f", the gradient's norm {float(grad_norm)}"
    shown = ", ".join(rows[:_SHOWN_ROWS]) + (f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else "")
    state = f"{kept} holds the state before it" if kept else "no checkpoint holds the state before it"
    return (
        f"step {step}: the loss is {losses}{norm}, on rows {shown} ({report} shows them); {state}; mend or leave "
        "out what is wrong with the rows, or lower --learning_rate"
    )
