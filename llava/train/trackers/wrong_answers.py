"""Send wrong answers of a validation, with their images, to the trackers that show images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.files.markdown_text import escape_markdown, format_markdown_table
from llava.train.trackers.tolerance import Failures, tracker_callbacks
from llava.train.validation.evaluator import Evaluator
from llava.train.validation.mistakes import ShownMistake, choose_mistakes, show_mistakes

KEY = "eval/wrong_answers"
_COLUMNS = ("image", "question", "true answer", "given answer")
Log = Callable[[TrainerCallback, Sequence[ShownMistake], int], None]
"""Sends wrong answers of a step through transformers' callback of a tracker."""


class WrongAnswers(TrainerCallback):
    """After each validation, sends some wrong answers to the trackers that show images; rank 0 does, of its questions.

    Args:
        evaluator: keeps the mistakes of its last measurement.
        callbacks: of the trainer; those of trackers are used.
        failures: counts by the trackers' names, from `tolerate_failures`.
    """

    def __init__(
        self, evaluator: Evaluator, callbacks: Sequence[TrainerCallback], failures: Mapping[str, Failures]
    ) -> None:
        self.evaluator = evaluator
        found = tracker_callbacks(callbacks)
        self._logs = [
            (callback, failures[name].tolerated(LOGS[name])) for name, callback in found.items() if name in LOGS
        ]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Choose some mistakes and send them."""
        chosen = choose_mistakes(self.evaluator.mistakes)
        if not state.is_world_process_zero or not self._logs or not chosen:
            return
        shown = show_mistakes(chosen, self.evaluator.session)
        for callback, log in self._logs:
            log(callback, shown, state.global_step)


def log_to_tensorboard(callback: TrainerCallback, shown: Sequence[ShownMistake], step: int) -> None:
    """Write one image a number, and under Text a table with these numbers: images have no captions there."""
    from numpy import asarray

    for number, mistake in enumerate(shown, 1):
        callback.tb_writer.add_image(f"{KEY}/{number:02}", asarray(mistake.image), step, dataformats="HWC")
    callback.tb_writer.add_text(KEY, markdown_table(shown), step)
    callback.tb_writer.flush()


def log_to_wandb(callback: TrainerCallback, shown: Sequence[ShownMistake], step: int) -> None:
    """Log captioned images beside the step that transformers logs too."""
    import wandb

    images = [wandb.Image(mistake.image, caption=mistake.caption) for mistake in shown]
    wandb.log({KEY: images, "train/global_step": step})


def log_to_trackio(callback: TrainerCallback, shown: Sequence[ShownMistake], step: int) -> None:
    """Log a table whose first column holds the images."""
    import trackio

    rows = [[trackio.Image(mistake.image), *mistake[1:]] for mistake in shown]
    table = trackio.Table(columns=list(_COLUMNS), data=rows)
    trackio.log({KEY: table, "train/global_step": step})


def log_to_mlflow(callback: TrainerCallback, shown: Sequence[ShownMistake], step: int) -> None:
    """Log images by number and step, and their texts as a file of the run: images have no captions there."""
    import mlflow

    for number, mistake in enumerate(shown, 1):
        mlflow.log_image(mistake.image, key=f"wrong_answer_{number:02}", step=step)
    mlflow.log_text(markdown_table(shown), f"wrong_answers/step_{step:08}.md")


LOGS: dict[str, Log] = {
    "mlflow": log_to_mlflow,
    "tensorboard": log_to_tensorboard,
    "trackio": log_to_trackio,
    "wandb": log_to_wandb,
}
"""How a tracker gets them, by its name for `--report_to`; trackers that are not here get the figures alone."""


def markdown_table(shown: Sequence[ShownMistake]) -> str:
    """Return numbers, questions and answers as a table; what Markdown would obey is escaped."""
    rows = [
        (f"{number:02}", *(escape_markdown(text) or "(empty)" for text in mistake[1:]))
        for number, mistake in enumerate(shown, 1)
    ]
    return format_markdown_table([_COLUMNS, *rows])
