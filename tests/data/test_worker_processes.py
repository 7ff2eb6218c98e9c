"""Killed worker processes are started again once, and nothing is lost, doubled or out of order."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from llava.data.worker_processes import RestartingLoader, WorkerKilled, map_in_processes, usable_cores

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps what a test defines"),
    pytest.mark.usefixtures("quick_look_for_dead_workers"),
]

SAID = "a worker process was killed, perhaps for want of memory; the workers are started again, once"
TWICE = r"^worker processes were killed twice, perhaps for want of memory; use fewer$"


def kill_once(marks: Path, index: int, at: dict[int, int]) -> None:
    """Kill this process at an index as often as `at` says; a file counts, for it outlives the process."""
    for number in range(at.get(index, 0)):
        try:
            (marks / f"{index}-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


class Numbers(Dataset):
    """Numbers; the processes that read some of them are killed."""

    def __init__(self, count, marks, at):
        self.count, self.marks, self.at = count, marks, at

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        kill_once(self.marks, index, self.at)
        return torch.tensor([index, torch.utils.data.get_worker_info() is None])


def numbers_of(batches):
    return [batch[:, 0].tolist() if batch.ndim == 2 else batch[0].item() for batch in batches]


@pytest.mark.parametrize("at", [{}, {0: 1}, {9: 1}, {29: 1}, {5: 2}], ids=str)
def test_a_pool_is_started_again_once(tmp_path, at, caplog):
    def double(item):
        kill_once(tmp_path, item, at)
        return 2 * item

    globals()["double"] = double  # processes find it by its name
    double.__qualname__ = "double"
    results = map_in_processes(double, range(30), 2, chunk=4, way_out="use fewer")
    if 2 in at.values():
        with pytest.raises(WorkerKilled, match=TWICE):
            list(results)
        return
    assert list(results) == list(range(0, 60, 2))
    assert [record.message for record in caplog.records] == [SAID] * len(at)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"prefetch_factor": 5}], ids=str)
@pytest.mark.parametrize("at", [{}, {0: 1}, {7: 1}, {19: 1}], ids=str)
def test_a_loader_goes_on_where_it_stopped(tmp_path, at, options, caplog):
    """Shuffled batches of two epochs equal those of a plain loader, and so do the generators afterwards."""
    found = []
    for kind in (DataLoader, RestartingLoader):
        torch.manual_seed(5)
        data = Numbers(20, tmp_path, at if kind is RestartingLoader else {})
        sampler = BatchSampler(RandomSampler(data), 3, drop_last=False)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=2, **options)
        if kind is RestartingLoader:
            loader = RestartingLoader.like(loader, "use fewer")
        found.append(([numbers_of(loader) for _ in range(2)], torch.rand(2).tolist()))
    assert found[0] == found[1]
    assert [record.message for record in caplog.records] == [SAID] * len(at)


@pytest.mark.parametrize("is_batched", [True, False])
def test_a_loader_ends_at_the_second_kill(tmp_path, is_batched):
    sampler = [[0, 1], [2, 3], [4, 5]] if is_batched else range(6)
    loader = RestartingLoader(
        Numbers(6, tmp_path, {4: 2}), sampler, way_out="use fewer", is_batched=is_batched, num_workers=1
    )
    assert len(loader) == len(sampler)
    with pytest.raises(WorkerKilled, match=TWICE):
        list(loader)


def test_what_came_before_the_second_kill_is_there(tmp_path):
    loader = RestartingLoader(
        Numbers(6, tmp_path, {4: 2}), range(6), way_out="use fewer", is_batched=False, num_workers=1
    )
    found = []
    with pytest.raises(WorkerKilled, match=TWICE):
        for batch in loader:
            found.append(batch[0].item())
    assert found == list(range(len(found)))
    assert len(found) <= 4


def test_a_kill_is_not_noticed_in_the_middle_of_a_step(tmp_path, caplog):
    """torch's DataLoader raises from a signal handler, wherever the process is: in a forward pass, while saving."""
    loader = RestartingLoader(Numbers(40, tmp_path, {}), range(40), way_out="x", is_batched=False, num_workers=1)
    with caplog.at_level(logging.WARNING):
        batches = iter(loader)
        found = [next(batches)[0].item()]
        (worker,) = torch.multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()  # a handler would raise here
        found += [batch[0].item() for batch in batches]
    assert found == list(range(40))
    assert caplog.messages == [SAID]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError, ConnectionResetError, EOFError])
def test_errors_of_rows_are_raised_as_they_are(tmp_path, kind):
    class Bad(Numbers):
        def __getitem__(self, index):
            raise kind("row 0 is odd")

    loader = RestartingLoader(Bad(1, tmp_path, {}), range(1), way_out="x", is_batched=False, num_workers=1)
    with pytest.raises(kind, match="row 0 is odd"):
        list(loader)


def test_without_workers_nothing_is_different(tmp_path):
    loader = RestartingLoader(Numbers(4, tmp_path, {}), [[0, 1], [2, 3]], way_out="x")
    assert numbers_of(loader) == [[0, 1], [2, 3]]
    assert all(batch[:, 1].all() for batch in loader)


def test_cores_that_this_process_may_use():
    assert 1 <= usable_cores() <= os.cpu_count()
