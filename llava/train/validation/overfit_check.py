"""Overfit check: train on the first batch alone for a few steps; its loss must fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llava.train.fault_tolerance import rng_state

FP16_LOSS_SCALE = 2.0**12
"""Lifts fp16 gradients of a loss averaged over tokens above the smallest fp16 number; few overflow."""


def overfit(
    model: nn.Module,
    batch: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    autocast: Callable[[], AbstractContextManager],
    loss_scale: float = 1.0,
) -> tuple[float, float]:
    """Overfit one batch with AdamW, then restore the weights and the random generators.

    Args:
        model: on its device, with `requires_grad` set; not wrapped for distributed training.
        batch: keyword arguments of the model, labels included.
        groups: the optimizer's parameter groups `{"params": ..., "lr": ...}`; "lr" defaults to `learning_rate`.
        steps: number of updates, without warm-up.
        autocast: context of the forward passes.
        loss_scale: factor of the loss in backward passes, for fp16; lowered after an overflow, whose step is skipped.

    Returns:
        the loss before and after, without dropout.
    """
    state, was_training = rng_state.capture(), model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = [parameter.detach().clone() for parameter in trainable]
    masters = {parameter: parameter.detach().float().clone() for parameter in trainable}
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
            (loss * loss_scale).backward()
            loss_scale = _update(optimizer, masters, loss_scale)
        return before, _loss_without_dropout(model, batch, autocast)
    finally:
        with torch.no_grad():
            for parameter, values in zip(trainable, initial, strict=True):
                parameter.copy_(values)
                parameter.grad = None
        model.train(was_training)
        rng_state.restore(state)


def require_fall(before: float, after: float, steps: int, learning_rate: float) -> None:
    """Fail the overfit check unless the loss fell.

    Raises:
        ValueError: if it did not.
    """
    if not math.isfinite(after) or after >= before:
        raise ValueError(
            f"--sanity_check {steps}: the loss of the first batch went from {before:.4f} to {after:.4f} in "
            f"{steps} steps on it alone; lower --learning_rate {learning_rate}, take more steps, or check its rows"
        )


@torch.no_grad()
def _loss_without_dropout(
    model: nn.Module, batch: dict[str, Any], autocast: Callable[[], AbstractContextManager]
) -> float:
    model.eval()
    with autocast():
        return model(**batch).loss.item()


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, masters: dict[nn.Parameter, Tensor], loss_scale: float) -> float:
    """Update the parameters from their scaled gradients; return the scale of the next step's loss."""
    for parameter, master in masters.items():
        master.grad = None if parameter.grad is None else parameter.grad.float() / loss_scale
        parameter.grad = None
    if loss_scale > 1 and not all(master.grad is None or master.grad.isfinite().all() for master in masters.values()):
        return loss_scale / 2
    optimizer.step()
    for parameter, master in masters.items():
        parameter.copy_(master)
    return loss_scale
