"""transformers' Trainer whose runs may be killed at any moment, asked to end, and stop before a bad update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.train import checkpoints, guards, randomness
from llava.train.learners import Learners
from llava.train.signals import Stopped, StopRequest, outlive_launcher

_DISK_FULL = ("PytorchStreamWriter", "unexpected pos", "No space left")
"""How torch's writers say, in a RuntimeError, that a file could not be written."""


class DurableTrainer(Trainer):
    """A Trainer with whole checkpoints, an exact resume, an end on signals and a guard against non-finite losses.

    In a step that is not logged it waits for the device once, to see that loss and gradient are numbers: where the
    optimizer leaves out a bad update by itself the device computes it meanwhile, else it is asked to only then.

    Args:
        data_collator: makes batches of rows.
        kwargs: of `transformers.Trainer`.
    """

    def __init__(self, *, data_collator: Callable, **kwargs: Any) -> None:
        super().__init__(data_collator=guards.NumberedCollator(data_collator), **kwargs)
        self.stop_request = StopRequest()
        self.ending = 0  # the signal that any process got, once all of them know
        self._resumed_from: Path | None = None
        self._written_in: Path | None = None
        self._batches: list[guards.MicroBatch] = []
        self._unread: tuple[guards.Arriving, Tensor | float | None] | None = None  # flags, gradient's norm
        self._learners: Learners | None = None
        self._watch = _StepWatch(self)
        self.add_callback(self._watch)

    def describe_row(self, row: int) -> dict[str, Any]:
        """Return what a report says of a row of the training data."""
        return {"row": row}

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does.

        Raises:
            Stopped: after saving, if a signal asked for the end.
            NonFiniteError: if a loss or gradient is no number; the state before that step is saved.
            OSError: if a checkpoint can't be written.
        """
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.stop_request:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except Stopped:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return a step's batches; none if all steps were done when training began, for which the Trainer asks too."""
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute one batch's loss and gradient, remembering its rows."""
        self._batches.append(guards.MicroBatch(inputs.pop(guards.ROW_KEY, [])))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches[-1].loss = loss
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; under DeepSpeed, whose backward pass also updates, it is checked here."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_deepspeed_enabled and model.training:
            batch = self._batches[-1]
            batch.loss = (result[0] if isinstance(result, tuple) else result).detach()
            if guards.agree([guards.is_bad_step([batch], None)], self.args.device)[0]:
                self._stop_at_bad_step(None)
        return result

    def find_learners(self) -> None:
        """Look up what learns, so that no step does; where weights are partitioned, the libraries do as they must."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        self._learners = Learners(self.model_wrapped)
        self.model_wrapped.zero_grad = self._learners.zero_grad  # of this one module; the Trainer calls it in each step

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        return super()._clip_grad_norm(self._learners or model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        # The loss scaling of fp16 meets infinite gradients in its search, and passes over those steps itself.
        is_bad = guards.is_bad_step(self._batches, None if self.args.fp16 else norm)
        flags = guards.combine([is_bad, self.stop_request.number], self.args.device)
        self._unread = guards.Arriving(flags), norm
        optimizer = self._optimizer_that_skips()
        if optimizer is None or not isinstance(flags, Tensor):
            self.read_flags()
        else:
            optimizer.found_inf = flags[0]
        return norm

    def _optimizer_that_skips(self) -> torch.optim.Optimizer | None:
        """Return the optimizer if it leaves out an update whose `found_inf` is 1, as for PyTorch's loss scaling."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.fp16:
            return None
        optimizer = self.optimizer.optimizer  # inside accelerate's
        return optimizer if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"] else None

    def use_the_wait(self) -> None:
        """Give the device further work before it is waited for."""

    def read_flags(self) -> None:
        """Wait for the flags of the step, if they are not read yet, and stop if its loss or gradient is no number."""
        if self._unread is None:
            return
        self.use_the_wait()
        (flags, norm), self._unread = self._unread, None
        bad, signal = flags.wait()
        optimizer = self._optimizer_that_skips()
        if optimizer is not None:
            optimizer.found_inf = None
        if bad:
            self._stop_at_bad_step(norm)
        self.ending = int(signal)
        self._batches = []

    def _stop_at_bad_step(self, norm: Tensor | float | None) -> NoReturn:
        step = self.state.global_step + 1
        mine = guards.describe_batches(self._batches, self.args.process_index, self.describe_row)
        batches = guards.only_bad([batch for described in guards.gather(mine) for batch in described])
        report = Path(self.args.output_dir) / f"nonfinite_step_{step}.json"
        kept = self._keep_state_before(norm)
        if self.is_world_process_zero():
            guards.write_report(report, step, norm, batches)
        raise guards.NonFiniteError(guards.describe_stop(step, norm, batches, report, kept))

    def _keep_state_before(self, norm: Tensor | float | None) -> Path | None:
        """Save what the run had before the step that failed, if it is not saved yet; return where it is."""
        if self.state.global_step == self._watch.first_step:
            return self._resumed_from
        has_updated = self.is_deepspeed_enabled and norm is not None and not self.accelerator.optimizer_step_was_skipped
        target = self._checkpoint_path()
        if guards.gather(target.is_dir())[0]:
            return target
        if has_updated:
            return None
        randomness.restore(self._watch.randomness)
        self._tr_loss.copy_(self._watch.unlogged_loss)
        self.args.save_only_model = False
        self._save_checkpoint(self.model, None)
        return target

    def _checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written_in) if self._written_in else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = self._checkpoint_path()
        place = checkpoints.place_to_write(target)
        try:
            if self.args.should_save:
                checkpoints.begin_writing(target)
            self.accelerator.wait_for_everyone()
            self._written_in = place
            super()._save_checkpoint(model, trial)
            self._written_in = None
            self._keep_unlogged_loss(place / target.name)
            self._correct_best(place, target)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(target)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(place, ignore_errors=True)
            if not isinstance(error, OSError) and not any(words in str(error) for words in _DISK_FULL):
                raise
            raise OSError(
                f"{target} can't be written ({error}); make room or choose another --output_dir, and run the same "
                "command again to go on from the checkpoint before"
            ) from error
        finally:
            self._written_in = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            checkpoints.rotate(self.args.output_dir, limit, written=target, best=best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._written_in is None:  # else it is not at its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _correct_best(self, place: Path, target: Path) -> None:
        """Name the best checkpoint by where it will be, in the state and its file, if it is the one being written."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == place:
            self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(place / target.name / checkpoints.STATE_FILE))

    def _unlogged_loss_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"unlogged_loss_{self.args.process_index}.json"

    def _keep_unlogged_loss(self, checkpoint: Path) -> None:
        if self._globalstep_last_logged < self.state.global_step:
            content = {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
            self._unlogged_loss_file(checkpoint).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def restore_unlogged_loss(self) -> None:
        """Go on with the sum of losses that the resumed run had not logged yet."""
        path = self._resumed_from and self._unlogged_loss_file(self._resumed_from)
        if path and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            self._tr_loss.fill_(content["loss"])
            self._globalstep_last_logged = content["last_logged_step"]

    def clone_unlogged_loss(self) -> Tensor:
        """Return the sum of losses since the last logged step."""
        return self._tr_loss.clone()

    def _get_dataloader(self, dataset: Dataset, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        if is_training:
            choose = kwargs.pop("sampler_fn", None)
            sampler = choose and choose(dataset)
            loader = super()._get_dataloader(
                guards.NumberedRows(dataset), *args, is_training=True, sampler_fn=lambda _: sampler, **kwargs
            )
            if hasattr(sampler, "set_epoch"):  # else accelerate doesn't tell it of epochs resumed by several processes
                loader.set_sampler(sampler)
        else:
            loader = super()._get_dataloader(dataset, *args, **kwargs)
        inner = loader.base_dataloader  # of accelerate's
        inner.worker_init_fn = _WorkerStart(inner.worker_init_fn)
        if self.args.dataloader_persistent_workers:  # started once, they must not draw from the generators of dropout
            inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader


class _WorkerStart:
    """Prepares a data worker; then does what else was to be done."""

    def __init__(self, further: Callable[[int], None] | None) -> None:
        self.further = further

    def __call__(self, worker: int) -> None:
        outlive_launcher()
        if self.further is not None:
            self.further(worker)


class _StepWatch(TrainerCallback):
    """Remembers how a step began, and ends the run after the step in which a signal came.

    Attributes:
        first_step: steps that were done when training began.
        randomness: of the generators before the step.
        unlogged_loss: before the step.
    """

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer
        self.first_step = 0
        self.randomness: randomness.Randomness | None = None
        self.unlogged_loss: Tensor | None = None
        self._is_epochs_first = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step
        control.should_training_stop |= state.global_step >= state.max_steps
        self.trainer.find_learners()
        self.trainer.restore_unlogged_loss()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.randomness = randomness.capture()
        self._is_epochs_first = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.first_step:  # the run had ended before it went on
            control.should_log = control.should_evaluate = control.should_save = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An epoch's data loader draws from the generators as it starts; a resumed run starts it again.
        if not self._is_epochs_first:
            self.randomness = randomness.capture()
        self._is_epochs_first = False
        self.unlogged_loss = self.trainer.clone_unlogged_loss()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.read_flags()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.ending:
            args.save_only_model = False
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.ending:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise Stopped(self.trainer.ending, state.global_step, str(checkpoint))
