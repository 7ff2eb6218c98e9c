"""Out-of-memory errors of training as one message: which process, what was planned, what to pass, what is saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from llava.train.fault_tolerance.checkpoint_dir import list_checkpoints
from llava.train.flags.training_arguments import TrainingArguments

_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What an error that is no `torch.OutOfMemoryError` says: CUDA's runtime, the CPU's allocators, cuBLAS."""


class OutOfMemory(RuntimeError):
    """A device or the machine has no memory left for a step; the message says what to pass."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        has_text = isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
        if isinstance(error, torch.OutOfMemoryError) or has_text:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained_out_of_memory(training_args: TrainingArguments, describe_way_out: Callable[[], str]) -> Iterator[None]:
    """Turn whatever says that memory ran out into `OutOfMemory`.

    Args:
        training_args: flags; name the process, its device and the checkpoints.
        describe_way_out: returns what was estimated and which flags need less.

    Raises:
        OutOfMemory: instead of the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0].partition(". ")[0].rstrip(".")
        place = f"process {training_args.process_index} on {training_args.device}"
        message = f"out of memory, {place}: {reason}; {describe_way_out()}; {describe_saved(training_args)}"
    else:
        return
    raise OutOfMemory(message)  # outside the handler: the error's frames hold the tensors of the step


def describe_saved(training_args: TrainingArguments) -> str:
    """Return the words about the newest checkpoint, which is complete: checkpoints are written atomically."""
    checkpoints = list_checkpoints(training_args.output_dir)
    if not checkpoints:
        return "no checkpoint was written yet"
    newest = checkpoints[max(checkpoints)]
    return f"{newest} is intact, and the same command with these flags resumes from it"
