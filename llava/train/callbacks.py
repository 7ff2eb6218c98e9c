"""What happens beside the steps of training: a last validation, early stopping, the picture of the curves, cleaning."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.train.arguments import TrainingArguments
from llava.train.plots import PLOT_FILE, draw_curves

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux names shared memory; other systems have no such folder."""


class LastValidation(TrainerCallback):
    """Validates at the last step too, so that the curve ends where the training does."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a validation at the last step, where steps decide."""
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class EarlyStopping(TrainerCallback):
    """Ends training when the metric of the best checkpoint has not improved for a number of validations.

    It counts in the logged history, which checkpoints hold, so a resumed run stops where an uninterrupted one does.

    Args:
        patience: validations without a better value.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end if the run that goes on had ended so."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end where the best value lies too far back."""
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        values = [row[name] for row in state.log_history if name in row]
        best = (max if args.greater_is_better else min)(values, default=None)
        since = len(values) - 1 - values.index(best) if values else 0
        if since >= self.patience:
            logger.info("%s has not improved on %.4f for %d validations; training ends here", name, best, since)
            control.should_training_stop = True
        return control


class CurvePlot(TrainerCallback):
    """Draws `loss.png` into the output directory at the end of training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw it, or log what to install."""
        if not state.is_world_process_zero:
            return
        try:
            draw_curves(state.log_history, Path(args.output_dir) / PLOT_FILE, best_step=state.best_global_step)
        except ImportError as error:
            logger.warning("%s", error)


class NamelessBuffers(TrainerCallback):
    """Takes the names off the 66 MiB by which each of DeepSpeed's processes on a CPU adds gradients up with the others.

    DeepSpeed never removes them. Nameless, they go with the processes, however those end.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unlink this process's buffer, which all others have mapped once they are through the barrier."""
        if args.deepspeed and args.device.type == "cpu":
            torch.distributed.barrier()
            place = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
            name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place}_{torch.distributed.get_rank()}"
            (SHARED_MEMORY / name).unlink(missing_ok=True)
