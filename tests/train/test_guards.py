"""What is no number is found, and its rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.train.guards import (
    ROW_KEY,
    Arriving,
    MicroBatch,
    NumberedCollator,
    NumberedRows,
    agree,
    describe_batches,
    describe_stop,
    gather,
    is_bad_step,
    only_bad,
    write_report,
)


def batch(loss, *rows):
    return MicroBatch(list(rows), torch.tensor(loss))


NUMBERS = [
    ([1.0, 2.0], None, True),
    ([1.0, 2.0], 3.0, True),
    ([1.0, 2.0], torch.tensor(3.0), True),
    ([1.0, float("nan")], 3.0, False),
    ([float("inf")], None, False),
    ([1.0], float("nan"), False),
    ([1.0], torch.tensor(float("inf")), False),
    ([], torch.tensor(float("nan")), False),
    ([], None, True),
]


@pytest.mark.parametrize(("losses", "norm", "expected"), NUMBERS)
def test_numbers(losses, norm, expected):
    assert bool(is_bad_step([batch(loss) for loss in losses], norm)) is not expected


def test_a_batch_without_loss_yet_says_nothing():
    assert not is_bad_step([batch(1.0), MicroBatch([3])], None)
    assert describe_batches([MicroBatch([3])], 0, lambda row: {"row": row}) == []


def test_only_bad_batches_are_described():
    batches = [batch(1.0, 1, 2), batch(float("nan"), 3)]
    found = describe_batches(batches, 1, lambda row: {"row": row, "text": "x"})
    assert found == [{"process": 1, "loss": "nan", "rows": [{"row": 3, "text": "x"}]}]
    good = describe_batches(batches[:1], 0, lambda row: {"row": row})
    assert good == [{"process": 0, "loss": "1.0", "rows": [{"row": 1}, {"row": 2}]}]
    assert only_bad([*good, *found]) == found
    assert only_bad(good) == good


def test_the_report_and_the_message(tmp_path):
    batches = [{"process": 0, "loss": "nan", "rows": [{"row": row} for row in range(20)]}]
    write_report(tmp_path / "report.json", 7, torch.tensor(float("inf")), batches)
    assert json.loads((tmp_path / "report.json").read_text()) == {"step": 7, "grad_norm": "inf", "batches": batches}
    write_report(tmp_path / "report.json", 7, None, batches)
    assert json.loads((tmp_path / "report.json").read_text())["grad_norm"] is None
    message = describe_stop(7, 2.5, batches, Path("report.json"), Path("out/checkpoint-6"))
    assert message == (
        "step 7: the loss is nan, the gradient's norm 2.5, on rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, "
        "15 and 4 more (report.json shows them); out/checkpoint-6 holds the state before it; mend or leave out what is "
        "wrong with the rows, or lower --learning_rate"
    )
    message = describe_stop(1, None, batches, Path("report.json"), None)
    assert "the loss is nan, on rows 0, " in message
    assert "; no checkpoint holds the state before it; " in message


def test_rows_carry_their_numbers_through_the_collator():
    rows = NumberedRows([{"x": 5}, {"x": 6}])
    collate = NumberedCollator(lambda rows: {"x": [row["x"] for row in rows]})
    assert len(rows) == 2
    assert rows.__getitems__([1, 0]) == [rows[1], rows[0]]
    assert collate([rows[1], rows[0]]) == {"x": [6, 5], ROW_KEY: [1, 0]}
    assert collate([{"x": 5}]) == {"x": [5]}


def test_rows_are_read_together_where_the_dataset_does_that():
    class Together(list):
        def __getitems__(self, indices):
            return [f"{index} of {len(indices)}" for index in indices]

    assert [*NumberedRows(Together("abc")).__getitems__([2, 0])] == [(2, "2 of 2"), (0, "0 of 2")]


def test_one_process_agrees_with_itself():
    assert agree([True, 15, 0.5], torch.device("cpu")) == [1, 15, 0.5]
    assert agree([torch.tensor(True), 15, torch.tensor(0.5)], torch.device("cpu")) == [1, 15, 0.5]
    assert gather("x") == ["x"]


def test_numbers_arrive_as_they_were_when_they_were_asked_for():
    assert Arriving([0.0, 15.0]).wait() == [0.0, 15.0]
    assert Arriving(torch.tensor([1.0, 0.0])).wait() == [1.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_arrive_while_the_device_works_on():
    flags, large = torch.ones(2, device="cuda"), torch.ones(8192, 8192, device="cuda")
    torch.mm(large, large)  # loads the kernel
    torch.cuda.synchronize()
    arriving = Arriving(flags)
    for _ in range(20):
        torch.mm(large, large)
    done = torch.cuda.Event()
    done.record()
    assert arriving.wait() == [1.0, 1.0]
    assert not done.query()
