"""A NaN or infinite loss or gradient is found, and its rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.train.distributed import gather_objects, max_over_ranks
from llava.train.fault_tolerance.nonfinite import (
    ROW_KEY,
    MicroBatch,
    NumberedCollator,
    NumberedRows,
    describe_batches,
    describe_stop,
    is_non_finite,
    only_non_finite,
    write_report,
)


def batch(loss, *rows):
    return MicroBatch(list(rows), torch.tensor(loss))


CASES = [  # losses, gradient norm, whether all are finite
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


@pytest.mark.parametrize(("losses", "norm", "expected"), CASES)
def test_non_finite_values_are_found(losses, norm, expected):
    assert bool(is_non_finite([batch(loss) for loss in losses], norm)) is not expected


def test_a_batch_without_loss_counts_as_finite():
    assert not is_non_finite([batch(1.0), MicroBatch([3])], None)
    assert describe_batches([MicroBatch([3])], 0, lambda row: {"row": row}) == []


def test_only_non_finite_batches_are_described():
    batches = [batch(1.0, 1, 2), batch(float("nan"), 3)]
    found = describe_batches(batches, 1, lambda row: {"row": row, "text": "x"})
    assert found == [{"process": 1, "loss": "nan", "rows": [{"row": 3, "text": "x"}]}]
    good = describe_batches(batches[:1], 0, lambda row: {"row": row})
    assert good == [{"process": 0, "loss": "1.0", "rows": [{"row": 1}, {"row": 2}]}]
    assert only_non_finite([*good, *found]) == found
    assert only_non_finite(good) == good


def test_the_report_and_the_message(tmp_path):
    batches = [{"process": 0, "loss": "nan", "rows": [{"row": row} for row in range(20)]}]
    write_report(tmp_path / "report.json", 7, torch.tensor(float("inf")), batches)
    assert json.loads((tmp_path / "report.json").read_text()) == {"step": 7, "grad_norm": "inf", "batches": batches}
    write_report(tmp_path / "report.json", 7, None, batches)
    assert json.loads((tmp_path / "report.json").read_text())["grad_norm"] is None
    message = describe_stop(7, 2.5, batches, Path("report.json"), Path("out/checkpoint-6"))
    assert message == (
        "step 7: the loss is nan, the gradient's norm 2.5, on rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, "
        "15 and 4 more (report.json shows them); out/checkpoint-6 holds the state before it; fix or leave out these "
        "rows, or lower --learning_rate"
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


def test_one_rank_without_process_group():
    assert max_over_ranks([True, 15, 0.5], torch.device("cpu")) == [1, 15, 0.5]
    assert max_over_ranks([torch.tensor(True), 15, torch.tensor(0.5)], torch.device("cpu")) == [1, 15, 0.5]
    assert gather_objects("x") == ["x"]
