"""Writes a trainer's checkpoints atomically: hidden directory, manifest, rename, then rotation."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.constants import STATE_FILE
from llava.files.json_files import parse_json
from llava.train.fault_tolerance import checkpoint_dir

_DISK_FULL = ("PytorchStreamWriter", "unexpected pos", "No space left")
"""Words of the RuntimeError in which torch's writers report that a file could not be written."""


class CheckpointWriter(TrainerCallback):
    """Writes `checkpoint-N` atomically, with what transformers leaves out of it.

    Args:
        trainer: whose checkpoints are written.

    Attributes:
        resumed_from: checkpoint that this run continues, None at a fresh start.
        unlogged_loss: sum of losses since the last logged step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.resumed_from: Path | None = None
        self.unlogged_loss = UnloggedLoss(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the sum of losses that the interrupted run had not logged yet."""
        if self.resumed_from is not None:
            self.unlogged_loss.load(self.resumed_from)

    @property
    def target(self) -> Path:
        """Path of the current step's checkpoint."""
        return checkpoint_dir.checkpoint_path(self.trainer.args.output_dir, self.trainer.state.global_step)

    def write(self, save: Callable[[], None]) -> None:
        """Write the current step's checkpoint and remove those beyond `save_total_limit`; every rank must call it.

        Args:
            save: writes the checkpoint below `output_dir`, as transformers does.

        Raises:
            OSError: if it can't be written; the checkpoints that were there are left as they were.
        """
        args, state, wait = self.trainer.args, self.trainer.state, self.trainer.accelerator.wait_for_everyone
        target = self.target
        hidden = checkpoint_dir.hidden_directory(target)
        try:
            if args.should_save:
                checkpoint_dir.begin_writing(target)
            wait()
            with replaced(args, output_dir=str(hidden)):
                save()
            self.unlogged_loss.save(hidden / target.name)
            self._correct_best(hidden, target)
            wait()
            if args.should_save:
                checkpoint_dir.publish(target)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if not isinstance(error, OSError) and not any(words in str(error) for words in _DISK_FULL):
                raise
            raise OSError(
                f"{target} can't be written ({error}); make room or choose another --output_dir, and run the same "
                "command again to go on from the checkpoint before"
            ) from error
        wait()
        if args.should_save:
            best = state.best_model_checkpoint
            checkpoint_dir.rotate(args.output_dir, args.save_total_limit, written=target, best=best)

    def _correct_best(self, hidden: Path, target: Path) -> None:
        """Replace the hidden path of the best checkpoint in the state and its file, if it is the one being written."""
        state = self.trainer.state
        best = state.best_model_checkpoint
        if best is not None and Path(best).parent == hidden:
            state.best_model_checkpoint = str(target)
            if self.trainer.args.should_save:
                state.save_to_json(str(hidden / target.name / STATE_FILE))


class UnloggedLoss:
    """Sum of losses since the last logged step, for the first loss that a resumed run logs.

    transformers keeps it under private names of the trainer, and leaves it out of its checkpoints.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def clone(self) -> Tensor:
        """Return a copy of the sum, on the device."""
        return self.trainer._tr_loss.clone()

    def set(self, value: Tensor | float) -> None:
        """Replace the sum."""
        self.trainer._tr_loss.fill_(value)

    def save(self, checkpoint: Path) -> None:
        """Write this rank's sum into a checkpoint, unless all losses are logged."""
        trainer = self.trainer
        if trainer._globalstep_last_logged < trainer.state.global_step:
            content = {"loss": trainer._tr_loss.item(), "last_logged_step": trainer._globalstep_last_logged}
            self._file(checkpoint).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Continue the sum that this rank wrote into a checkpoint, if it did."""
        path = self._file(checkpoint)
        if path.is_file():
            content = parse_json(path.read_text(encoding="utf-8"))
            self.set(content["loss"])
            self.trainer._globalstep_last_logged = content["last_logged_step"]

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"unlogged_loss_{self.trainer.args.process_index}.json"


@contextlib.contextmanager
def replaced(target: object, **values: Any) -> Iterator[None]:
    """Within `with`, give attributes of an object other values."""
    former = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(target, name, value)
