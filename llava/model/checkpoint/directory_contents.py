"""Error message for a directory that holds no model: what was found, and which directory to give instead."""

from __future__ import annotations

import re
from pathlib import Path

from llava.constants import CHECKPOINT_PREFIX
from llava.model.checkpoint.read_tensors import INDEX_ENDING, PICKLE_FILE, SAFETENSORS_FILE

_SHARD = re.compile(r"(.+)-\d+-of-\d+(\.safetensors|\.bin)")


def describe_lack(directory: Path) -> str:
    """Return the message for a directory without a model, with a way out where the file names show one."""
    names = sorted(path.name for path in directory.iterdir())
    found = f"{directory} holds no model: no weights, no adapter, no projector (found {', '.join(names) or 'nothing'})"
    shard = next((match for name in names if (match := _SHARD.fullmatch(name))), None)
    inside = [name for name in names if name.startswith(CHECKPOINT_PREFIX)]
    if any(name.startswith("adapter_model.") for name in names):
        way_out = "adapter_config.json is missing; fetch it from where the adapter is from"
    elif shard:
        way_out = f"{shard[1]}{shard[2]}{INDEX_ENDING} is missing, which says which shard holds which tensor; fetch it"
    elif inside:
        way_out = f"checkpoints of an unfinished run are inside; give one of them, such as {directory / inside[-1]}"
    elif any(name.startswith("global_step") for name in names):
        way_out = (
            "DeepSpeed's states alone; make weights of them with the zero_to_fp32.py beside them, if you trust their "
            "source: it runs what the files ask for"
        )
    elif files := [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]:
        expected = SAFETENSORS_FILE if files[0].endswith(".safetensors") else PICKLE_FILE
        way_out = f"weights are read from {expected}; rename {files[0]} to that if it holds them all"
    elif any(name.endswith(".gguf") for name in names):
        way_out = "GGUF is llama.cpp's; give the 16-bit weights it was made from"
    else:
        return found
    return f"{found}; {way_out}"
