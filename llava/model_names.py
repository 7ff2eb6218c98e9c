"""Names of models in logs and answer files."""

from __future__ import annotations

from pathlib import Path, PurePath

from llava.constants import CHECKPOINT_PREFIX


def get_model_name_from_path(model_path: str) -> str:
    """Return a directory's name for logs and answer files; of `run/checkpoint-500`, `run_checkpoint-500`."""
    *parents, name = PurePath(model_path.strip("/")).parts or (Path.cwd().name,)
    return f"{parents[-1]}_{name}" if name.startswith(CHECKPOINT_PREFIX) and parents else name
