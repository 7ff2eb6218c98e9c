"""LLaVA-1.5 for one job: teach it to answer your questions about images, then answer thousands of them.

`llava.load(path)` loads a model for Python and notebooks; `help(llava.load)` says how.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llava.library_noise import quiet_bitsandbytes, quiet_pillow
from llava.original_names import install, lazy_names

if TYPE_CHECKING:
    from llava.inference.loaded_model import LoadedModel

__version__ = "2.0.0"
__getattr__ = lazy_names(__name__)

quiet_bitsandbytes()
quiet_pillow()
install()


def load(
    model_path: str | os.PathLike[str],
    model_base: str | os.PathLike[str] | None = None,
    *,
    bits: int | str = 16,
    device: str | None = None,
    dtype: str | None = None,
    vision_tower: str | None = None,
    conv_mode: str | None = None,
) -> LoadedModel:
    """Load a model for Python and notebooks.

    Args:
        model_path: a checkpoint: a directory, or an id on the hub.
        model_base: base of an adapter or a projector; None = the one that it records.
        bits: 16, or 8 or 4 through bitsandbytes, or "fp8" on GPUs that have it.
        device: None = the best one, or all GPUs if the first is too small.
        dtype: of the weights; None = the device's best.
        vision_tower: directory or hub id, for weights that hold none.
        conv_mode: prompt template; None = the one saved with the weights.

    Returns:
        The model, with `ask`, `ask_many` and `chat`.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: if bitsandbytes is needed and not installed.
        ValueError: if files or options contradict each other.

    Example:
        >>> import llava
        >>> model = llava.load("llava_merged_model")
        >>> print(model.ask("man.jpg", "What is the man holding?"))
    """
    from llava.inference.loaded_model import LoadedModel
    from llava.inference.session import Session

    session = Session.load(
        os.fspath(model_path),
        None if model_base is None else os.fspath(model_base),
        bits=bits,
        device=device,
        dtype=dtype,
        vision_tower=vision_tower,
        conv_mode=conv_mode,
    )
    return LoadedModel(session, os.fspath(model_path))
