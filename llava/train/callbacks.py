"""Callbacks of training: log file, last validation, early stopping, finished runs, loss plot, shared memory."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.constants import PLOT_FILE
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.loss_plot import draw_curves
from llava.train.output_files import LOG_FILE

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
"""Folder of shared memory on Linux; other systems have none."""


def is_infinite(value: Any) -> bool:
    """Whether a logged figure is infinite or NaN, as the gradient's norm of a step that fp16's loss scaling skips."""
    return isinstance(value, float) and not math.isfinite(value)


class FileLog(TrainerCallback):
    """Appends each logged step as a line of `train_log.jsonl`, in the output directory."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the figures with the step and the time in seconds since 1970; JSON has no infinite ones: null."""
        if state.is_world_process_zero and logs:
            finite = {name: None if is_infinite(value) else value for name, value in logs.items()}
            with (Path(args.output_dir) / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **finite}) + "\n")


class LastValidation(TrainerCallback):
    """Validates after the last step too, so that the loss plot ends where the training does."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a validation at the last step under `--eval_strategy steps`."""
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class EarlyStopping(TrainerCallback):
    """Ends training when the metric of the best checkpoint has not improved for a number of validations.

    It counts in the logged history, which checkpoints hold: a resumed run stops where an uninterrupted one does.

    Args:
        patience: validations without a better value.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end if the resumed run had ended by early stopping."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end if the best value is `patience` validations old."""
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        values = [row[name] for row in state.log_history if name in row]
        best = (max if args.greater_is_better else min)(values, default=None)
        since = len(values) - 1 - values.index(best) if values else 0
        if since >= self.patience:
            logger.info("%s has not improved on %.4f for %d validations; training ends here", name, best, since)
            control.should_training_stop = True
        return control


class SkipFinishedRun(TrainerCallback):
    """Lets a resumed run that had already finished end without a further step, log line, validation or checkpoint."""

    def __init__(self) -> None:
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the end if all steps are done."""
        self._first_step = state.global_step
        control.should_training_stop |= state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the end of an epoch asks for if the epoch had no step."""
        if state.global_step == self._first_step:
            control.should_log = control.should_evaluate = control.should_save = False


class CurvePlot(TrainerCallback):
    """Draws `loss.png` into the output directory at the end of training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the plot, or log what to install."""
        if not state.is_world_process_zero:
            return
        try:
            draw_curves(state.log_history, Path(args.output_dir) / PLOT_FILE, best_step=state.best_global_step)
        except ImportError as error:
            logger.warning("%s", error)


class UnlinkSharedMemory(TrainerCallback):
    """Unlinks the 66 MiB of shared memory through which each rank of DeepSpeed on a CPU reduces gradients.

    DeepSpeed never removes them. Unlinked, the memory is freed with the processes, however those end.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unlink this rank's buffer, which all others have mapped once they are past the barrier."""
        if args.deepspeed and args.device.type == "cpu":
            torch.distributed.barrier()
            place = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
            name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place}_{torch.distributed.get_rank()}"
            (SHARED_MEMORY / name).unlink(missing_ok=True)
