"""Loss scaling of fp16: count the updates that are skipped because gradients overflowed."""

from __future__ import annotations

import logging

from accelerate import Accelerator

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 15
"""Skipped updates in a row after which a run stops: the loss scale, 65,536 at first, is down to 2 or 4.

DeepSpeed raises an exception of its own two updates later.
"""


class SkippedUpdates:
    """Updates that loss scaling has skipped, each of which lowered the loss scale.

    The first steps of a run skip some while the largest scale without overflow is found, and later a step in thousands.

    Args:
        accelerator: of the trainer.

    Attributes:
        total: skipped updates.
        in_a_row: those since the last update that was made.
        steps: all steps.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.total = self.in_a_row = self.steps = 0
        self._accelerator = accelerator
        self._scale = accelerator.scaler.get_scale() if accelerator.scaler else None

    def note(self, step: int) -> None:
        """Count a step after its update, and log it if the update was skipped."""
        was_skipped = self._was_skipped()
        self.steps += 1
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0
        self.total += was_skipped
        if was_skipped:
            logger.info(
                "step %d: gradients overflowed in fp16, so its update is skipped and the loss scale lowered, which is "
                "normal in the first steps (%d skipped so far)",
                step,
                self.total,
            )

    def _was_skipped(self) -> bool:
        if self._scale is None:  # DeepSpeed scales
            return self._accelerator.optimizer_step_was_skipped
        # accelerate does not notice what fused AdamW, the default, skips inside its kernel; a lower scale tells.
        before, self._scale = self._scale, self._accelerator.scaler.get_scale()
        return self._scale < before

    @property
    def are_endless(self) -> bool:
        """Whether so many were skipped in a row that the gradient itself must be infinite or NaN."""
        return self.in_a_row >= MOST_IN_A_ROW

    def log_total(self) -> None:
        """Log the total, if there are any."""
        if self.total:
            logger.info("fp16 loss scaling skipped %d of %d updates", self.total, self.steps)
