"""The planner's packs are those that training makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.packing import pack_records
from llava.data.records import EncodedRecord, spliced_length
from llava.model.memory import StepLoad
from llava.model.planner.data_packs import ByteChunks, packs_of_data
from llava.model.planner.workload import Packs, PaddedRows

PATCHES = 4
VQA_COUNTS = [
    len(asked)
    for asked in json.loads((Path(__file__).parents[3] / "benchmarks/vqa_lengths.json").read_text())["questions"]
]


def record(image: int, number: int) -> EncodedRecord:
    ids = [1, 5, IMAGE_TOKEN_INDEX, 10 + number, 6, 2]
    return EncodedRecord(ids, [IGNORE_INDEX] * 5 + [2], [Path(f"{image}.jpg")])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 6), st.sampled_from([None, 16]))
def test_loads_are_those_of_the_packs_that_are_collated(counts, batch, budget):
    records = [record(image, number) for image, count in enumerate(counts) for number in range(count)]
    lengths = [spliced_length(record.input_ids, PATCHES) for record in records]
    packs = Packs.of_records(records, lengths, seed=3)
    order = packs.order(batch)
    assert sorted(order) == list(range(len(records)))
    largest = packs.largest(batch, budget=budget)
    for start in range(0, len(order), batch):
        rows = [records[row] for row in order[start : start + batch]]
        images = list(dict.fromkeys(row.images[0] for row in rows))
        features = [[range(PATCHES * images.index(row.images[0]), PATCHES * images.index(row.images[0]) + PATCHES)]
                    for row in rows]  # fmt: skip
        pack = pack_records(rows, features, multiple=128)
        assert len(images) <= largest.images
        assert len(pack.supervised) <= largest.predicted
        if budget is None:
            assert pack.input_ids.numel() <= largest.positions


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 6))
def test_synthetic_packs_equal_those_of_records(counts, batch):
    records = [record(image, number) for image, count in enumerate(counts) for number in range(count)]
    lengths = [spliced_length(record.input_ids, PATCHES) for record in records]
    real = Packs.of_records(records, lengths, seed=42)
    made = Packs.of_counts(counts, patches=PATCHES, suffix=3, system_prefix=2)
    assert made.sharing.groups == real.sharing.groups
    if len(counts) > 1:  # else the system prefix is the whole of the common one
        assert made.order(batch) == real.order(batch)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 24, 48, 64])
def test_a_geometric_spread_has_the_packs_of_the_vqa_table(batch):
    real, made = Packs.of_counts(VQA_COUNTS, patches=576), Packs.of_mean(4.25, patches=576)
    assert made.mean_load(batch).positions == pytest.approx(real.mean_load(batch).positions, rel=0.05)
    assert made.largest(batch).positions == pytest.approx(real.largest(batch).positions, rel=0.07)


@given(st.floats(1, 50))
def test_the_mean_is_the_one_asked_for(mean):
    groups = Packs.of_mean(mean, patches=PATCHES).sharing.groups
    assert sum(map(len, groups)) / len(groups) == pytest.approx(mean, rel=0.02)


def test_smaller_batches_share_less():
    packs = Packs.of_mean(4.25, patches=576)
    per_question = [packs.mean_load(batch).positions / batch for batch in (64, 16, 8, 4, 2, 1)]
    assert per_question == sorted(per_question)
    assert per_question[1] == pytest.approx(163, abs=2)
    assert per_question[-1] == 35 + 576 + 18


def test_rows_that_share_nothing():
    packs = Packs.of_mean(1, patches=576)
    assert packs.sampler(4) is None
    assert packs.largest(4) == StepLoad(positions=2432, images=4, predicted=64)  # 4 x 629 - 3 x 35, in whole blocks
    assert PaddedRows(640).largest(4) == StepLoad(2560, 4, 2560, 640)
    assert PaddedRows(640, is_padded=False).largest(4) == StepLoad(2560, 4, 2560)


def conversation(image, question):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "да"}]
    return {"image": image, "conversations": turns}


def test_packs_of_a_data_file_need_no_images(tmp_path):
    rows = [conversation(f"{index // 3}.jpg", f"Что это, номер {index}?") for index in range(9)]
    bad = [{"image": "x.jpg"}, {"conversations": [{"from": "human", "value": "alone"}]}, 7]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*rows, *bad]))
    packs, left_out = packs_of_data(str(data), "vicuna_v1", ByteChunks(), patches=576)
    assert (left_out, packs.sharing.groups) == (3, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    assert 576 + 25 < packs.sharing.prefixes[0] < 576 + 50
    assert packs.largest(9).images == 3


def test_a_data_file_without_a_usable_record(tmp_path):
    (tmp_path / "data.json").write_text('[{"image": "x.jpg"}]')
    with pytest.raises(ValueError, match=r"data.json holds no record that can be trained on; python -m"):
        packs_of_data(str(tmp_path / "data.json"), "vicuna_v1", ByteChunks(), patches=576)
