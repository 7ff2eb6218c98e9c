"""Training rows that become packs: each image of a batch is read once, each shared prefix laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llava.data.dataset import SupervisedDataset, batch_images
from llava.data.packing import pack_records
from llava.data.records import EncodedRecord

MODEL_ARGUMENTS = ("input_ids", "labels", "position_ids")
"""Columns of a pack that the model takes under their own names; the others are its `layout`."""


class PackedRow(NamedTuple):
    """A record and the pixels of its images, (3, H, W) or (tiles, 3, H, W) each."""

    record: EncodedRecord
    images: list[Tensor]


class PackedDataset(SupervisedDataset):
    """The same rows for `PackCollator`; a batch's images are decoded once each, however many rows ask about them."""

    def __getitem__(self, index: int) -> PackedRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[PackedRow]:
        """Return the rows of a batch; torch's loader calls it instead of asking for each row."""
        pixels: dict[Path, Tensor] = {}
        rows = []
        for index in indices:
            record = self.records[index]
            for path in record.images:
                if path not in pixels:
                    pixels[path] = self.read_image(path)
            rows.append(PackedRow(record, [pixels[path] for path in record.images]))
        return rows


class PackCollator:
    """Makes a batch of rows a pack, with the text they share before their questions once.

    Args:
        features_per_image: positions a picture, or each of its tiles, takes.
        image_size: side of a blank picture for batches without any, in pixels.
        budget: most positions of the pack's rows, unless a record alone is longer; None = one row.
        multiple: rows that are longer than all `lengths` are padded to a multiple of so many positions.
        lengths: others are padded to the shortest of these into which they fit.
    """

    def __init__(
        self,
        features_per_image: int,
        image_size: int,
        *,
        budget: int | None,
        multiple: int,
        lengths: Sequence[int] = (),
    ) -> None:
        self.features_per_image = features_per_image
        self.image_size = image_size
        self.budget = budget
        self.multiple = multiple
        self.lengths = lengths

    def __call__(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        """Return the model's arguments: input_ids, labels, position_ids, layout, see `Pack`; images, each once."""
        images: list[Tensor] = []
        place: dict[Path, range] = {}
        start = 0
        for row in rows:
            for path, pixels in zip(row.record.images, row.images, strict=True):
                if path not in place:
                    tiles = len(pixels) if pixels.ndim == 4 else 1
                    place[path] = range(start, start + tiles * self.features_per_image)
                    start = place[path].stop
                    images.append(pixels)
        records = [row.record for row in rows]
        features = [[place[path] for path in record.images] for record in records]
        pack = pack_records(records, features, budget=self.budget, multiple=self.multiple, lengths=self.lengths)
        columns = pack._asdict()
        batch = {name: columns.pop(name) for name in MODEL_ARGUMENTS}
        return {**batch, "layout": columns, "images": batch_images(images, self.image_size)}
