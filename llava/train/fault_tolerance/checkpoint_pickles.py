"""Load a checkpoint's pickles as data alone, so that no code in them runs.

DeepSpeed loads its files with `weights_only=False`, which lets a file run any command. Before a run resumes, every file
is loaded with `weights_only=True`; while the libraries load them again, every `torch.load` is forced to it too, so that
a file that was exchanged in between does not run either.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llava.model.checkpoint.read_tensors import load_plain_pickle

ENDINGS = (".pt", ".pth", ".bin")
DEEPSPEED_DIRECTORIES = "global_step*"
DEEPSPEED_GLOBALS = (
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""Classes named in DeepSpeed's files: ZeRO stages 0 to 3, offloaded or not, in fp32, bf16, fp16. All hold only data."""
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables of `torch.load`; the second is the opposite of the first, and both at once are an error."""


def refuse_code(checkpoint: Path) -> None:
    """Load every pickle of a checkpoint as data, to refuse one that holds code before anything resumes.

    Raises:
        ValueError: naming the file and what it would call, if it holds more than data, or is damaged.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.suffix in ENDINGS and path.is_file())
    with weights_only(with_deepspeed=any(checkpoint.glob(DEEPSPEED_DIRECTORIES))):
        for path in paths:
            load_plain_pickle(path)


@contextlib.contextmanager
def weights_only(*, with_deepspeed: bool) -> Iterator[None]:
    """Within `with`, force `weights_only=True` on every `torch.load` of this process.

    Args:
        with_deepspeed: accept the classes that DeepSpeed's files name, which imports it if it is installed.
    """
    former = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(_allowed_globals(with_deepspeed)):
            yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in former.items() if value is not None})


def _enum_member(enumeration: type[enum.Enum], name: str) -> enum.Enum:
    """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 pickles the members of enumerations, and nothing else.

    Raises:
        pickle.UnpicklingError: if it is not called for a member of an enumeration.
    """
    if not (isinstance(enumeration, type) and issubclass(enumeration, enum.Enum) and name in enumeration.__members__):
        raise pickle.UnpicklingError("getattr is called for something else than a member of an enumeration")
    return enumeration[name]


def _allowed_globals(with_deepspeed: bool) -> list[object]:
    """Return the classes in genuine files beyond PyTorch's own list: numpy's random state, DeepSpeed's settings."""
    reconstruct = np.empty(0).__reduce__()[0]
    allowed: list[object] = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    if with_deepspeed and importlib.util.find_spec("deepspeed") is not None:
        allowed += [getattr(importlib.import_module(module), name) for module, name in DEEPSPEED_GLOBALS]
        allowed.append((_enum_member, "builtins.getattr"))
    return allowed
