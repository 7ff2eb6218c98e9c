"""What measures on validation rows; where rows share an image prefix, over packs and by the batch engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llava.constants import IGNORE_INDEX
from llava.conversation import get_template
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.packed_dataset import PackCollator, PackedDataset
from llava.data.records import EncodedRecord
from llava.inference.backlog import Backlog, Failed
from llava.inference.engine import Engine
from llava.inference.grouping import Ask, Group, deal_groups, plan_groups
from llava.inference.session import Sampling, Session
from llava.model.checkpoint import Checkpoint
from llava.model.configuration import features_per_image
from llava.model.flat_llama import is_flat
from llava.model.pack import uncompiled_packs
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.packs import holds_all_weights, inner_llava
from llava.train.validation import Validator, choose_questions, find_questions, moved


def build_validator(
    records: Sequence[EncodedRecord],
    checkpoint: Checkpoint,
    model: nn.Module,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Validator:
    """Return what measures on validation records.

    Args:
        records: held out.
        checkpoint: training starts from it.
        model: that learns, not yet wrapped by the trainer.
        data_args, training_args: flags.

    Raises:
        ValueError: if the best checkpoint is asked for by accuracy, and no question's answer is short enough.
    """
    config, processor = checkpoint.config, checkpoint.image_processor
    template = get_template(config.conversation_template)
    session = Session(checkpoint.tokenizer, model, processor, template, config.max_position_embeddings)
    longest = data_args.eval_max_new_tokens
    questions = choose_questions(find_questions(records, session), data_args.eval_max_questions, longest)
    if not questions and training_args.metric_for_best_model in ("accuracy", "eval_accuracy"):
        raise ValueError(
            f"no validation answer has at most --eval_max_new_tokens {longest} tokens, so there is no accuracy; raise "
            "it or pass --metric_for_best_model eval_loss"
        )
    settings = ImageSettings(config.image_aspect_ratio, config.image_grid_pinpoints)
    patches, size = features_per_image(config, config.mm_vision_config), processor.crop_size["height"]
    parts = (records, processor, settings, patches)
    if training_args.share_image_prefix and holds_all_weights(training_args):
        kind, rows = SharedValidator, PackedDataset(*parts)
        collator = PackCollator(patches, size, budget=training_args.model_max_length, multiple=1)
    else:
        kind, rows = Validator, SupervisedDataset(*parts)
        collator = SupervisedCollator(checkpoint.tokenizer.pad_token_id or 0, size)
    return kind(
        rows=rows,
        collator=collator,
        questions=questions,
        prompts=SupervisedDataset([question.prompt for question in questions], processor, settings, patches),
        session=session,
        max_new_tokens=longest,
        batch_size=training_args.eval_batch_size,
        workers=training_args.dataloader_num_workers,
    )


@dataclass(frozen=True)
class SharedValidator(Validator):
    """Measures what `Validator` does, several times faster where an image has several questions.

    Its rows are a `PackedDataset` and its collator a `PackCollator`. Every process needs all the weights.
    """

    def _loss(self, model: nn.Module, device: torch.device, rank: int, processes: int) -> tuple[float, int]:
        llava = inner_llava(model)
        total, tokens = 0.0, 0
        with uncompiled_packs(llava):
            for batch in self._batches(self.rows, neighbours(self.rows, rank, processes), self.collator):
                inputs = {name: _moved_all(value, device) for name, value in batch.items()}
                total += llava(**inputs, num_items_in_batch=1).loss.item()
                tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        return total, tokens

    def _answers(self, rank: int, processes: int) -> Iterator[tuple[int, str]]:
        session, records = self.session, self.prompts.records
        if not is_flat(session.model) or not _computes_as_stored(session.model):
            yield from super()._answers(rank, processes)
            return
        asks = [
            Ask(number, record.input_ids, tuple(map(os.fspath, record.images))) for number, record in enumerate(records)
        ]
        patches = self.prompts.patches_per_image
        plan = plan_groups(asks, patches)
        groups = deal_groups(plan.groups, patches, processes)[rank]
        engine = Engine(session, Sampling(max_new_tokens=self.max_new_tokens), plan.stem_ids)
        pictures = DataLoader(
            _GroupPictures(self.prompts, groups),
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator(),  # of its own: a loader draws from it
        )
        backlog = Backlog(
            session, len(plan.stem_ids), groups, iter(pictures), room=self.max_new_tokens, is_padded=False
        )
        for result in engine.run(backlog):
            if isinstance(result, Failed):  # beyond the context, so not answered
                yield result.branch.ask.key, ""
            else:
                yield result.ask.key, session.decode(result.generated)


class _GroupPictures(Dataset):
    """Pixels of each group's images."""

    def __init__(self, prompts: SupervisedDataset, groups: Sequence[Group]) -> None:
        self.prompts = prompts
        self.images = [prompts.records[group.branches[0].ask.key].images for group in groups]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [self.prompts.read_image(path) for path in self.images[index]]


def neighbours(rows: SupervisedDataset, rank: int, processes: int) -> list[int]:
    """Return the rows of one process, those of one image beside each other."""
    ordered = sorted(range(len(rows)), key=lambda row: (list(map(os.fspath, rows.records[row].images)), row))
    return ordered[len(ordered) * rank // processes : len(ordered) * (rank + 1) // processes]


def _computes_as_stored(model: nn.Module) -> bool:
    """Return whether the dtype of the LLM's weights is that of its results: the engine's cache has it."""
    weight = model.get_input_embeddings().weight
    kind = weight.device.type
    return not torch.is_autocast_enabled(kind) or weight.dtype == torch.get_autocast_dtype(kind)


def _moved_all(value: Tensor | list[Tensor] | dict[str, Tensor], device: torch.device) -> object:
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return moved(value, device)
