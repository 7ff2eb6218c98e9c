"""The first batch, learnt alone for a few steps: if its loss doesn't fall, no run will."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llava.train import randomness


def overfit(
    model: nn.Module,
    batch: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[float, float]:
    """Learn one batch with AdamW, then put the weights and the random generators back as they were.

    Args:
        model: on its device, with `requires_grad` set; not wrapped for distributed training.
        batch: keyword arguments of the model, labels included.
        groups: the optimizer's, `{"params": ..., "lr": ...}`; those without a rate get `learning_rate`.
        steps: updates, at the full learning rate.
        learning_rate: of the run.
        autocast: what forward passes run in.

    Returns:
        the loss before and after, without dropout.
    """
    state, was_training = randomness.capture(), model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    former = [parameter.detach().clone() for parameter in learning]
    masters = {parameter: parameter.detach().float().clone() for parameter in learning}
    optimizer = torch.optim.AdamW(
        [{**group, "params": [masters[parameter] for parameter in group["params"]]} for group in groups],
        lr=learning_rate,
    )
    try:
        before = _loss_without_dropout(model, batch, autocast)
        model.train()
        for _ in range(steps):
            with autocast():
                loss = model(**batch).loss
            loss.backward()
            _update(optimizer, masters)
        return before, _loss_without_dropout(model, batch, autocast)
    finally:
        with torch.no_grad():
            for parameter, values in zip(learning, former, strict=True):
                parameter.copy_(values)
                parameter.grad = None
        model.train(was_training)
        randomness.restore(state)


def require_fall(before: float, after: float, steps: int, learning_rate: float) -> None:
    """Refuse a batch that could not be learnt.

    Raises:
        ValueError: if the loss did not fall.
    """
    if not math.isfinite(after) or after >= before:
        raise ValueError(
            f"--sanity_check {steps}: the loss of the first batch went from {before:.4f} to {after:.4f} in "
            f"{steps} steps on it alone; lower --learning_rate {learning_rate} or take more steps, and look at its rows"
        )


@torch.no_grad()
def _loss_without_dropout(
    model: nn.Module, batch: dict[str, Any], autocast: Callable[[], AbstractContextManager]
) -> float:
    model.eval()
    with autocast():
        return model(**batch).loss.item()


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, masters: dict[nn.Parameter, Tensor]) -> None:
    for parameter, master in masters.items():
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    for parameter, master in masters.items():
        parameter.copy_(master)
