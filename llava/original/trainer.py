"""The original's trainer, for training loops of others; the scripts here train with `llava.train.trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from llava.data.length_sampler import group_by_length, group_by_modality
from llava.train.lora import parameter_groups


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """Return an order of rows in which those that are seen together have similar lengths."""
    batches = group_by_length(range(len(lengths)), lengths, batch_size * world_size, generator)
    return [index for batch in batches for index in batch]


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Return such an order in which those that are seen together all have images, or none has.

    Args:
        lengths: of rows with an image; negative, of rows without.
        batch_size: rows of a process.
        world_size: processes, times accumulation steps.
        generator: of the randomness; None = torch's.
    """
    sizes, has_image = [abs(length) for length in lengths], [length > 0 for length in lengths]
    return group_by_modality(sizes, has_image, batch_size * world_size, generator)


class LengthGroupedSampler(Sampler[int]):
    """Rows in the order of `get_length_grouped_indices`, or with `group_by_modality` of the other function."""

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
    ) -> None:
        if lengths is None:
            raise ValueError("lengths is None; pass the length of each row")
        self.batch_size, self.world_size, self.lengths = batch_size, world_size, lengths
        self.generator, self.group_by_modality = generator, group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(order(self.lengths, self.batch_size, self.world_size, generator=self.generator))


class LLaVATrainer(Trainer):
    """transformers' Trainer with a learning rate of the projector and batches of one modality.

    Reads `mm_projector_lr` and `group_by_modality_length` of its arguments, and `modality_lengths` of its dataset.

    Args:
        args: as of `transformers.Trainer`.
        tokenizer: what `transformers.Trainer` calls `processing_class` now.
        kwargs: as of `transformers.Trainer`.
    """

    def __init__(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, made once."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                Trainer.get_decay_parameter_names(None, model),
                weight_decay=self.args.weight_decay,
                projector_lr=getattr(self.args, "mm_projector_lr", None),
            )
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not getattr(self.args, "group_by_modality_length", False) or dataset is None:
            return super()._get_train_sampler(dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=dataset.modality_lengths,
            group_by_modality=True,
        )
