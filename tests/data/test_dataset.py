"""Literal rows in, literal batches out."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava.clip_image_processor import CLIPPixels
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.records import EncodedRecord
from llava.image_files.errors import ImageError

IGNORE, IMAGE = -100, -200


@pytest.fixture
def processor():
    return CLIPPixels(2, image_mean=(0, 0, 0), image_std=(1, 1, 1))


def row(ids, labels, *images):
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": list(images)}


def test_rows_hold_ids_labels_and_pixels(tmp_path, processor):
    Image.new("RGB", (2, 2), (255, 0, 51)).save(tmp_path / "a.png")
    records = [
        EncodedRecord([1, IMAGE, 7, 2], [IGNORE, IGNORE, 7, 2], [tmp_path / "a.png"]),
        EncodedRecord([1, 8, 2], [IGNORE, 8, 2], []),
    ]
    dataset = SupervisedDataset(records, processor, ImageSettings("pad"), patches_per_image=576)
    assert len(dataset) == 2
    assert dataset.lengths == [579, 3]
    assert dataset.has_image == [True, False]
    assert dataset[0]["input_ids"].tolist() == [1, IMAGE, 7, 2]
    assert dataset[0]["labels"].tolist() == [IGNORE, IGNORE, 7, 2]
    pixels = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(dataset[0]["images"][0], pixels)
    assert dataset[1]["images"] == []
    assert dataset[1]["input_ids"].dtype == torch.int64


def test_the_aspect_ratio_reaches_the_pixels(tmp_path, processor):
    Image.new("RGB", (4, 2), (255, 255, 255)).save(tmp_path / "wide.png")
    records = [EncodedRecord([IMAGE], [IGNORE], [tmp_path / "wide.png"])]
    crop = SupervisedDataset(records, processor, ImageSettings(None), 1)[0]["images"][0]
    assert torch.equal(crop, torch.ones(3, 2, 2))
    padded = SupervisedDataset(records, processor, ImageSettings("pad"), 1)[0]["images"][0]
    assert not torch.equal(padded, crop)
    tiles = SupervisedDataset(records, processor, ImageSettings("anyres", [[4, 2]]), 1)[0]["images"][0]
    assert tiles.shape == (3, 3, 2, 2)


def test_a_missing_image_is_named(tmp_path, processor):
    records = [EncodedRecord([IMAGE], [IGNORE], [tmp_path / "gone.png"])]
    with pytest.raises(ImageError, match=r"gone.png not found, its folder has no images; check the image folder"):
        SupervisedDataset(records, processor, ImageSettings("pad"), 1)[0]


def test_a_mixed_batch():
    one, two = torch.full((3, 2, 2), 1.0), torch.full((3, 2, 2), 2.0)
    batch = SupervisedCollator(pad_token_id=9, image_size=2)(
        [
            row([1, IMAGE, 5, IMAGE, 2], [IGNORE, IGNORE, IGNORE, IGNORE, 2], one, two),
            row([1, 4, 2], [IGNORE, 4, 2]),
        ]
    )
    assert sorted(batch) == ["attention_mask", "images", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[1, IMAGE, 5, IMAGE, 2], [1, 4, 2, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, IGNORE, 2], [IGNORE, 4, 2, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert torch.equal(batch["images"], torch.stack([one, two]))


def test_a_padding_id_inside_the_text_counts():
    batch = SupervisedCollator(pad_token_id=0, image_size=2)([row([1, 0, 2], [IGNORE, 0, 2])])
    assert batch["attention_mask"].tolist() == [[True, True, True]]


def test_a_batch_of_text_brings_one_blank_image():
    batch = SupervisedCollator(pad_token_id=0, image_size=2)([row([1, 2], [1, 2]), row([1], [1])])
    assert torch.equal(batch["images"], torch.zeros(1, 3, 2, 2))


def test_pictures_of_different_numbers_of_tiles_stay_a_list():
    few, many = torch.zeros(2, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    batch = SupervisedCollator(0, 2)([row([IMAGE], [IGNORE], few), row([IMAGE], [IGNORE], many)])
    assert [tuple(images.shape) for images in batch["images"]] == [(2, 3, 2, 2), (4, 3, 2, 2)]
