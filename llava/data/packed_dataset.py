"""Dataset and collator of packs: each image of a batch is decoded once, each shared prefix laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llava.data.dataset import SupervisedDataset, batch_images
from llava.data.packing import pack_records
from llava.data.records import EncodedRecord


class PackedRow(NamedTuple):
    """A record and the pixels of its images, (3, height, width) or (tiles, 3, height, width) each."""

    record: EncodedRecord
    images: list[Tensor]


class PackedDataset(SupervisedDataset):
    """Dataset for `PackCollator`; each image of a batch is decoded once, however many records ask about it."""

    def __getitem__(self, index: int) -> PackedRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[PackedRow]:
        """Return the records of a batch with their pixels; torch's loader calls it once for each batch."""
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
    """Collate the records of a batch to a pack, in which shared prefixes stand once.

    Args:
        features_per_image: positions an image, or each of its tiles, takes.
        image_size: side of the blank image of a batch without images, in pixels.
        budget: most positions of a row of the pack, unless a record alone is longer; None = one row.
        multiple: rows longer than all `lengths` are padded to a multiple of it, in positions.
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
        """Return the arguments of `PackedLlavaForCausalLM.forward`: the arrays of a `Pack`, and images, each once."""
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
        return {**pack._asdict(), "images": batch_images(images, self.image_size)}
