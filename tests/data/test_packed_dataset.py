"""Literal rows in, literal packs out; each image is read and encoded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava.clip_image_processor import CLIPPixels
from llava.constants import SYSTEM_PREFIX
from llava.data.dataset import ImageSettings
from llava.data.packed_dataset import PackCollator, PackedDataset, PackedRow
from llava.data.packing import Pack
from llava.data.records import EncodedRecord

__, IMAGE = -100, -200


def question(*words, images=("a.png",)):
    ids = [1, *[IMAGE] * len(images), *words, 2]
    return EncodedRecord(ids, [__] * (len(ids) - 1) + [2], [Path(name) for name in images])


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    for name, color in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0))):
        Image.new("RGB", (2, 2), color).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    records = [question(5, 6), question(5, 7, 6), question(8, 6, images=("b.png",)), question(4, 6, images=())]
    return PackedDataset(records, CLIPPixels(2, image_mean=(0, 0, 0), image_std=(1, 1, 1)), ImageSettings("pad"), 2)


def test_a_batch_reads_each_image_once(dataset, monkeypatch):
    read = []
    original = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path: read.append(path.name) or original(path))
    rows = dataset.__getitems__([0, 2, 1, 3])
    assert read == ["a.png", "b.png"]
    assert rows[0].images[0] is rows[2].images[0]
    assert [row.record for row in rows] == [dataset.records[index] for index in (0, 2, 1, 3)]
    assert rows[3].images == []
    assert dataset[2].images[0][:, 0, 0].tolist() == [0, 1, 0]


def test_what_a_loader_hands_to_the_model(dataset):
    collator = PackCollator(2, 2, budget=None, multiple=16)
    (batch,) = DataLoader(dataset, batch_size=4, collate_fn=collator)
    assert set(batch) == {*Pack._fields, "images"}
    assert batch["images"].shape == (2, 3, 2, 2)
    assert batch["images"][:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert batch["input_ids"].tolist() == [[1, 0, 0, 5, 6, 2, 7, 6, 2, 0, 0, 8, 6, 2, 4, 6, 2, *[0] * 15]]
    assert batch["groups"][0, :12].tolist() == [SYSTEM_PREFIX, *[0] * 8, *[1] * 3]
    assert batch["patches"].tolist() == [0, 1, 2, 3]


def test_tiles_take_their_places_one_after_the_other():
    one, two = torch.zeros(3, 3, 2, 2), torch.ones(2, 3, 2, 2)  # images of three and two tiles
    rows = [PackedRow(question(5, 6, images=("a", "b")), [one, two]), PackedRow(question(7, 6, images=("b",)), [two])]
    batch = PackCollator(2, 2, budget=None, multiple=1)(rows)
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 3, 2, 2), (2, 3, 2, 2)]
    assert batch["patches"].tolist() == [*range(10), *range(6, 10)]


def test_a_batch_of_text_brings_one_blank_image():
    batch = PackCollator(2, 2, budget=None, multiple=1)([PackedRow(question(5, 6, images=()), [])])
    assert torch.equal(batch["images"], torch.zeros(1, 3, 2, 2))
    assert batch["image_positions"].tolist() == []
