"""LLaVA's Trainer: transformers' loop with our batches, learning rates, checkpoints, and stops before a bad update.

One step, in the order in which transformers' loop calls what is here and in `fault_tolerance`:

1. `get_batch_samples`: read the step's micro-batches.
2. `StepGuard.on_step_begin`: note the state that a stop in this step goes back to.
3. `training_step`, per micro-batch: note its rows, forward, backward, note its loss. DeepSpeed updates in its backward
   pass, so `compute_loss` checks each loss before it.
4. `_get_grad_norm`: all ranks agree whether loss and gradient are finite and whether a signal arrived
   (`StepGuard.check`), the only wait for the device in a step that is not logged; then optimizer and schedule.
5. `StopRequest.on_step_end`: after a signal, ask for a checkpoint.
6. `evaluate`, `_save_checkpoint` (`CheckpointWriter.write`) as the flags ask; `StopRequest.on_save` ends the run.

Why not a training loop of our own over accelerate: every flag of `transformers.TrainingArguments` is accepted, and such
a loop would have to reproduce the behaviour of each: `auto_find_batch_size`, `torch_compile`, LOMO's and schedule-free
optimizers, schedulers that follow the validation, gradient accumulation with `num_items_in_batch` averaged over ranks
and context parallelism, DeepSpeed's own optimizers and schedulers, FSDP's order of wrapping, sharded optimizer states,
the skip of batches on resume, best checkpoints, token counts: 1,500 lines of transformers' that
change with every release. Four overrides of private methods, each with its reason, are less to keep up.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from llava.constants import PLOT_FILE
from llava.data.length_sampler import ModalityLengthSampler
from llava.hub.card_file import write_card
from llava.model.checkpoint.read_tensors import describe_refusal, is_refusal
from llava.train.callbacks import SkipFinishedRun
from llava.train.distributed import max_over_ranks
from llava.train.fault_tolerance import rng_state
from llava.train.fault_tolerance.checkpoint_pickles import weights_only
from llava.train.fault_tolerance.checkpoint_writer import CheckpointWriter
from llava.train.fault_tolerance.data_workers import prepare_workers, restart_workers_of
from llava.train.fault_tolerance.nonfinite import ROW_KEY, NumberedCollator, NumberedRows, StepGuard
from llava.train.fault_tolerance.signals import Stopped, StopRequest
from llava.train.flags.training_arguments import TrainingArguments, enable_activation_checkpointing
from llava.train.lora import parameter_groups
from llava.train.run_summary import mark_supervised
from llava.train.saving import Saver, atomic_fill
from llava.train.validation.evaluator import Evaluator
from llava.train.validation.overfit_check import FP16_LOSS_SCALE, overfit, require_fall


class LlavaTrainer(Trainer):
    """Trains the parameters whose `requires_grad` is set; see the module for the order of a step.

    Args:
        model: unwrapped, with adapters in place.
        args: flags.
        saver: writes and restores the trainable parameters.
        train_dataset: has `lengths` and `has_image`.
        data_collator: makes batches of its rows.
        evaluator: measures while training; None = no validation.
        train_sampler: order of the training rows; None = as `group_by_modality_length` says.
        kwargs: further arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        saver: Saver,
        train_dataset: Dataset,
        data_collator: Callable,
        evaluator: Evaluator | None = None,
        train_sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        settings["params"] = parameter_groups(
            model,
            Trainer.get_decay_parameter_names(None, model),
            weight_decay=args.weight_decay,
            projector_lr=args.mm_projector_lr,
            tower_lr=args.mm_vision_tower_lr,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=NumberedCollator(data_collator),
            eval_dataset=evaluator and evaluator.rows,
            optimizer_cls_and_kwargs=(optimizer, settings),
            **kwargs,
        )
        self.saver, self.evaluator, self.train_sampler = saver, evaluator, train_sampler
        self.checkpoint_writer = CheckpointWriter(self)
        self.step_guard = StepGuard(self, self.checkpoint_writer, self.describe_row)
        self.stop_request = StopRequest()
        # Last, so that they decide over what other callbacks ask for.
        for callback in (SkipFinishedRun(), self.checkpoint_writer, self.step_guard, self.stop_request):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does.

        Raises:
            Stopped: after saving, if a signal asked for the end.
            NonFiniteError: if a loss or gradient is not finite; the state before that step is saved.
            OSError: if a checkpoint can't be written.
            ValueError: if a file of the checkpoint holds more than data.
        """
        self.checkpoint_writer.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.stop_request, weights_only(with_deepspeed=self.is_deepspeed_enabled):
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except (pickle.UnpicklingError, RuntimeError) as error:
                if not is_refusal(error):
                    raise
                raise ValueError(describe_refusal(self.checkpoint_writer.resumed_from, error)) from None
            except Stopped:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    def get_train_dataloader(self) -> DataLoader:
        """Return transformers' loader over rows that carry their number, in this trainer's order."""
        # transformers' own takes no other dataset and no sampler; the method below does, and is called, not overridden.
        sampler = self.train_sampler if self.train_sampler is not None else self._make_sampler()
        rows, batch_size = NumberedRows(self.train_dataset), self._train_batch_size
        loader = self._get_dataloader(rows, "Training", batch_size, sampler_fn=lambda _: sampler, is_training=True)
        if hasattr(sampler, "set_epoch"):  # else accelerate doesn't pass it the epoch in which several ranks resume
            loader.set_sampler(sampler)
        prepare_workers(loader, self.args)
        return loader

    def _make_sampler(self) -> Sampler | None:
        if not self.args.group_by_modality_length:
            return self._get_train_sampler(self.train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        dataset = self.train_dataset
        return ModalityLengthSampler(dataset.lengths, dataset.has_image, rows_per_step, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """Return a step's batches; none if a resumed run had already finished, for which transformers asks too."""
        if self.control.should_training_stop:
            return [], None
        restart_workers_of(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward on one micro-batch, noting its rows and its loss."""
        self.step_guard.start_batch(inputs.pop(ROW_KEY, []))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_guard.note_loss(loss)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; under DeepSpeed, whose backward pass also updates, it is checked here."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_deepspeed_enabled and model.training:
            self.step_guard.check_loss((result[0] if isinstance(result, tuple) else result).detach())
        return result

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # `on_pre_optimizer_step`, the public hook before the update, is not given the norm.
        norm = super()._get_grad_norm(model, grad_norm)
        self.stop_request.agreed = self.step_guard.check(norm, self.stop_request.received)
        return norm

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure loss and accuracy on the validation rows and log them; every rank takes part."""
        started = time.monotonic()
        with self.accelerator.autocast():
            measured = self.evaluator.measure(self.model_wrapped, self.args.process_index, self.args.world_size)
        measured["runtime"] = round(time.monotonic() - started, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # `on_save`, the public hook, comes when the checkpoint is already in place.
        self.checkpoint_writer.write(functools.partial(super()._save_checkpoint, model, trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # transformers looks for its own file names, and would miss the parameters trained next to the adapter.
        self.saver.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # As above.
        self.saver.restore(Path(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete checkpoint of the model; every rank takes part, the first one writes."""
        state = self.saver.gather()
        if self.args.should_save:
            target = Path(output_dir or self.args.output_dir)
            with atomic_fill(target) as directory:
                self.saver.save(state, directory, is_result=not _internal_call)
                if not _internal_call:
                    write_card(directory, target, has_loss_curve=(target / PLOT_FILE).is_file())

    def check_first_batch(self, steps: int) -> tuple[float, float]:
        """Overfit a copy of the trainable parameters to each rank's first batch; call it before `train`.

        Args:
            steps: at the run's learning rate, without warm-up.

        Returns:
            the largest loss over the ranks before, and after. Weights and random generators are as they were.

        Raises:
            ValueError: if the loss does not fall.
        """
        state = rng_state.capture()
        batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        rng_state.restore(state)
        batch.pop(ROW_KEY)
        if self.args.checkpoints_activations:
            enable_activation_checkpointing(self.model, self.args)
        rate = self.args.learning_rate
        groups = self.optimizer_cls_and_kwargs[1]["params"]
        before, after = max_over_ranks(
            overfit(
                self.model,
                batch,
                groups,
                steps=steps,
                learning_rate=rate,
                autocast=self.accelerator.autocast,
                loss_scale=FP16_LOSS_SCALE if self.args.fp16 else 1.0,
            ),
            self.args.device,
        )
        require_fall(before, after, steps, rate)
        return before, after

    def describe_row(self, row: int) -> dict[str, Any]:
        """Return a training row's index, images and text, the supervised part marked."""
        record = self.train_dataset.records[row]
        text = mark_supervised(record, self.saver.metadata.tokenizer)
        return {"row": row, "images": [str(path) for path in record.images], "text": text}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate for a batch, with the model's parameters counted once a run."""
        return 6 * inputs["input_ids"].numel() * self._parameter_count

    @functools.cached_property
    def _parameter_count(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)
