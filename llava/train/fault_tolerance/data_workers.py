"""Worker processes of the training data loader: restarted once if killed, deaf to a launcher's signals."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from llava.data.worker_processes import RestartingLoader
from llava.train.fault_tolerance.signals import outlive_launcher
from llava.train.flags.training_arguments import TrainingArguments

FEWER_WORKERS = "pass a smaller --dataloader_num_workers (0: none), and run the same command again to go on"


def prepare_workers(loader: Any, args: TrainingArguments) -> None:
    """Set how a loader of accelerate's starts its workers; call it before the loader is iterated."""
    inner = loader.base_dataloader
    inner.worker_init_fn = functools.partial(_start_worker, further=inner.worker_init_fn)
    if args.dataloader_persistent_workers:  # started once, they must not draw from the generators of dropout
        inner.generator = torch.Generator().manual_seed(args.seed)
    _let_restart(loader)


def restart_workers_of(epoch: Iterator[Any]) -> None:
    """Let the loader of an epoch that has not begun start its workers again.

    A resumed epoch's loader is made by accelerate, inside transformers' loop; its iterator, a generator, is all that
    the trainer is given.
    """
    if inspect.isgenerator(epoch):
        _let_restart(inspect.getgeneratorlocals(epoch).get("self"))


def _let_restart(loader: Any) -> None:
    inner = getattr(loader, "base_dataloader", None)
    if isinstance(inner, DataLoader) and not isinstance(inner, RestartingLoader) and inner.num_workers:
        loader.base_dataloader = RestartingLoader.like(inner, FEWER_WORKERS)


def _start_worker(worker: int, *, further: Callable[[int], None] | None) -> None:
    outlive_launcher()
    if further is not None:
        further(worker)
