"""transformers' Trainer with LLaVA's batches, learning rates and directories."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from llava.data.sampler import ModalityLengthSampler
from llava.model.vision_tower import CLIPVisionTower
from llava.train import randomness
from llava.train.arguments import TrainingArguments, enable_activation_checkpointing
from llava.train.durable_trainer import DurableTrainer
from llava.train.guards import ROW_KEY, agree
from llava.train.lookahead import Lookahead
from llava.train.lora import parameter_groups
from llava.train.packs import holds_all_weights
from llava.train.recipe import mark_supervised
from llava.train.sanity import overfit, require_fall
from llava.train.saving import Saver, filled_at_the_end
from llava.train.validation import Validator

LOG_FILE = "train_log.jsonl"


class LlavaTrainer(DurableTrainer):
    """Trains what `requires_grad` says.

    Args:
        model: unwrapped, with adapters in place.
        args: flags.
        saver: writes and restores what learns.
        train_dataset: has `lengths` and `has_image`.
        validator: measures while training; None = no validation.
        train_sampler: order of the training rows; None = as `group_by_modality_length` says.
        kwargs: further ones of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        saver: Saver,
        train_dataset: Dataset,
        validator: Validator | None = None,
        train_sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        decayed = Trainer.get_decay_parameter_names(None, model)
        settings["params"] = parameter_groups(
            model,
            decayed,
            weight_decay=args.weight_decay,
            projector_lr=args.mm_projector_lr,
            tower_lr=args.mm_vision_tower_lr,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=validator and validator.rows,
            optimizer_cls_and_kwargs=(optimizer, settings),
            **kwargs,
        )
        self.saver = saver
        self.train_sampler = train_sampler
        self.validator = validator
        self._ahead: Lookahead | None = None
        self._tower = frozen_tower(model) if holds_all_weights(args) else None

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure loss and accuracy on the validation rows and log them; every process takes part."""
        started = time.monotonic()
        with self.accelerator.autocast():
            measured = self.validator.measure(self.model_wrapped, self.args.process_index, self.args.world_size)
        measured["runtime"] = round(time.monotonic() - started, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """Return a step's batches, of an iterator that is looked ahead in; see `use_the_wait`."""
        if self._ahead is None or self._ahead.batches is not epoch_iterator:
            self._ahead = Lookahead(epoch_iterator)
        return super().get_batch_samples(self._ahead, *args, **kwargs)

    def use_the_wait(self) -> None:
        """Let the device encode the next batch's images, so that it has something to do when the next step begins.

        An encoder's many small kernels take the host as long as the device. Images with tiles, and encoders that learn
        or are not here as a whole, are encoded when their batch comes.
        """
        batch = self._ahead.peek() if self._tower is not None and self._ahead is not None else None
        images = (batch or {}).get("images")
        if isinstance(images, Tensor) and images.ndim == 4 and "tower_features" not in batch:
            with torch.no_grad(), self.compute_loss_context_manager():
                batch["tower_features"] = self._tower(images)

    def check_first_batch(self, steps: int) -> tuple[float, float]:
        """Learn each process's first batch for a few steps on a copy of what learns; call it before `train`.

        Args:
            steps: at the run's learning rate, without warm-up.

        Returns:
            the largest loss over the processes before, and after. Weights and random generators are as they were.

        Raises:
            ValueError: if the loss does not fall.
        """
        state = randomness.capture()
        batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        randomness.restore(state)
        batch.pop(ROW_KEY)
        if self.args.checkpoints_activations:
            enable_activation_checkpointing(self.model, self.args)
        rate = self.args.learning_rate
        groups = self.optimizer_cls_and_kwargs[1]["params"]
        before, after = agree(
            overfit(self.model, batch, groups, steps=steps, learning_rate=rate, autocast=self.accelerator.autocast),
            self.args.device,
        )
        require_fall(before, after, steps, rate)
        return before, after

    def describe_row(self, row: int) -> dict[str, Any]:
        """Return a row's index, images and text, the supervised part marked."""
        record = self.train_dataset.records[row]
        text = mark_supervised(record, self.saver.beside.tokenizer)
        return {"row": row, "images": [str(path) for path in record.images], "text": text}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete directory; every process takes part, the first one writes."""
        state = self.saver.gather()
        if self.args.should_save:
            with filled_at_the_end(output_dir or self.args.output_dir) as directory:
                self.saver.save(state, directory, is_result=not _internal_call)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate for a batch, without counting the model's parameters anew each time."""
        return 6 * inputs["input_ids"].numel() * self._parameters_counted

    @functools.cached_property
    def _parameters_counted(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.train_sampler is not None and dataset is self.train_dataset:
            return self.train_sampler
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        together = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ModalityLengthSampler(dataset.lengths, dataset.has_image, together, self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.saver.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.saver.restore(Path(self.state.best_model_checkpoint))


def frozen_tower(model: nn.Module) -> CLIPVisionTower | None:
    """Return a model's image encoder; None if it learns or there is none."""
    towers = [module for module in model.modules() if isinstance(module, CLIPVisionTower)]
    learns = any(parameter.requires_grad for tower in towers for parameter in tower.parameters())
    return towers[0] if towers and not learns else None


class FileLog(TrainerCallback):
    """Writes each logged step as a line of `train_log.jsonl`, in the output directory."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the figures with the step and the time in seconds since 1970."""
        if state.is_world_process_zero and logs:
            with (Path(args.output_dir) / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}) + "\n")
