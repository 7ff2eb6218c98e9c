"""Training rows: ids and labels encoded at the start, pixels read by worker processes when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.data.records import EncodedRecord, spliced_length
from llava.image_processing import CLIPPixels, open_image
from llava.mm_utils import process_images


class ImageSettings(NamedTuple):
    """What `process_images` reads of a model's config."""

    image_aspect_ratio: str | None
    image_grid_pinpoints: list | str | None = None


class SupervisedDataset(Dataset):
    """Rows `{"input_ids": (T,) int64, "labels": (T,) int64, "images": list of pixel tensors}`.

    Args:
        records: encoded ones.
        image_processor: of the model.
        image_settings: how a picture is brought to a square.
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
        """Return the pixels of an image as the model takes them, (3, H, W) or (tiles, 3, H, W)."""
        return process_images([open_image(path)], self.image_processor, self.image_settings)[0]

    @property
    def lengths(self) -> list[int]:
        """Positions of each row, patches included."""
        return [spliced_length(record.input_ids, self.patches_per_image) for record in self.records]

    @property
    def has_image(self) -> list[bool]:
        """Whether each row has an image."""
        return [bool(record.images) for record in self.records]


class SupervisedCollator:
    """Makes a batch of rows, padded on the right.

    Args:
        pad_token_id: fills `input_ids`.
        image_size: side of the blank picture, in pixels.
    """

    def __init__(self, pad_token_id: int, image_size: int) -> None:
        self.pad_token_id = pad_token_id
        self.image_size = image_size

    def __call__(self, rows: Sequence[dict[str, Tensor | list[Tensor]]]) -> dict[str, Tensor | list[Tensor]]:
        """Return input_ids, labels (B, T) int64, attention_mask (B, T) bool, images (N, 3, H, W) or a list of tiles."""
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
    """Return pictures (N, 3, H, W), or a list where they have different numbers of tiles; a blank one if there is none.

    A batch without any image carries the blank picture, which the model encodes and adds as nothing: processes with
    text alone stay in step with the others.

    Args:
        images: (3, H, W) or (tiles, 3, H, W) each.
        image_size: side of the blank picture, in pixels.
    """
    if not images:
        return torch.zeros(1, 3, image_size, image_size)
    same = len({image.shape for image in images}) == 1
    return torch.stack(list(images)) if same else list(images)
