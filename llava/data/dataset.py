"""Dataset and collator of encoded records; worker processes decode the images of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava.clip_image_processor import CLIPPixels
from llava.constants import IGNORE_INDEX
from llava.data.records import EncodedRecord, spliced_length
from llava.image_files.decode import open_image
from llava.mm_utils import process_images


class ImageSettings(NamedTuple):
    """Settings of a model's config that `process_images` reads."""

    image_aspect_ratio: str | None
    image_grid_pinpoints: list | str | None = None


class SupervisedDataset(Dataset):
    """Dataset of `{"input_ids": (T,) int64, "labels": (T,) int64, "images": list of pixel tensors}`.

    Args:
        records: from `encode_records`.
        image_processor: of the model.
        image_settings: how an image becomes square.
        patches_per_image: tokens an image becomes; for `lengths`.
    """

    def __init__(
        self,
        records: Sequence[EncodedRecord],
        image_processor: CLIPPixels,
        image_settings: ImageSettings,
        patches_per_image: int,
    ) -> None:
        self.records = records
        self.image_processor = image_processor
        self.image_settings = image_settings
        self.patches_per_image = patches_per_image

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor | list[Tensor]]:
        record = self.records[index]
        pixels = [self.read_image(path) for path in record.images]
        return {"input_ids": torch.tensor(record.input_ids), "labels": torch.tensor(record.labels), "images": pixels}

    def read_image(self, path: Path) -> Tensor:
        """Return the pixels of an image as the model takes them, (3, height, width) or (tiles, 3, height, width)."""
        return process_images([open_image(path)], self.image_processor, self.image_settings)[0]

    @property
    def lengths(self) -> list[int]:
        """Positions of each record, patches included."""
        return [spliced_length(record.input_ids, self.patches_per_image) for record in self.records]

    @property
    def has_image(self) -> list[bool]:
        """Whether each record has an image."""
        return [bool(record.images) for record in self.records]


class SupervisedCollator:
    """Collate records of `SupervisedDataset` to a batch, padded on the right.

    Args:
        pad_token_id: fills `input_ids`.
        image_size: side of the blank image, in pixels.
    """

    def __init__(self, pad_token_id: int, image_size: int) -> None:
        self.pad_token_id = pad_token_id
        self.image_size = image_size

    def __call__(self, rows: Sequence[dict[str, Tensor | list[Tensor]]]) -> dict[str, Tensor | list[Tensor]]:
        """Return input_ids, labels (B, T) int64, attention_mask (B, T) bool, images as `batch_images`."""
        pad = torch.nn.utils.rnn.pad_sequence
        images = [image for row in rows for image in row["images"]]
        return {
            "input_ids": pad([row["input_ids"] for row in rows], batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad(
                [torch.ones(len(row["input_ids"]), dtype=torch.bool) for row in rows], batch_first=True
            ),
            "images": batch_images(images, self.image_size),
        }


def batch_images(images: Sequence[Tensor], image_size: int) -> Tensor | list[Tensor]:
    """Stack images to (N, 3, height, width), or list them if their numbers of tiles differ; a blank one if none.

    The model encodes the blank image of a batch without images and uses none of its features, so that a process whose
    batch is text alone stays in step with the others.

    Args:
        images: (3, height, width) or (tiles, 3, height, width) each.
        image_size: side of the blank image, in pixels.
    """
    if not images:
        return torch.zeros(1, 3, image_size, image_size)
    same = len({image.shape for image in images}) == 1
    return torch.stack(list(images)) if same else list(images)
