"""Which files of a checkpoint are uploaded and which are left out; checks that the checkpoint is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from llava.constants import CARD_FILE, PLOT_FILE, TRAINING_FILE
from llava.files.home_directory import expand_home
from llava.files.json_files import parse_json, read_settings
from llava.hub.model_facts import is_hub_id
from llava.model.adapter.adapter_config import ADAPTER_CONFIG_FILE
from llava.model.adapter.lora import read_adapter
from llava.model.adapter.non_lora import read_projector
from llava.model.builder import check_complete
from llava.model.checkpoint.checkpoint import Layout, detect_layout, open_checkpoint
from llava.model.checkpoint.hf_layout import RECORD, original_name
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.configuration import CONFIG_FILE
from llava.model.vision_tower import TOWER_PREFIX, released_name

MODEL_PATTERNS = (
    CONFIG_FILE,
    ADAPTER_CONFIG_FILE,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.safetensors",
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "vit.safetensors",
)
"""Names of the files that make a model: what else lies beside them is not uploaded, whatever its name."""
TEXT_PATTERNS = (CARD_FILE, PLOT_FILE, "LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*")
"""Names of the files for people."""
_OF_A_RUN = ("optimizer*", "scheduler.pt", "rng_state*", "random_states*", "global_step*", "scaler.pt")
"""Names in a checkpoint that training resumes from."""
_REASONS = {TRAINING_FILE: "has paths of this machine; the card has its recipe"}
BASE_KEY = "base_model_name_or_path"


class Selection(NamedTuple):
    """Files to upload by name, and the reason why each other name of the directory is left out, "" for none."""

    files: dict[str, Path]
    left_out: dict[str, str]


def select_files(directory: Path) -> Selection:
    """Divide the entries of a directory into what is uploaded and what is left out."""
    files, left_out = {}, {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and is_uploaded(path.name):
            files[path.name] = path
        else:
            left_out[f"{path.name}/" if path.is_dir() else path.name] = _REASONS.get(path.name, "")
    return Selection(files, left_out)


def is_uploaded(name: str) -> bool:
    """Return whether a file of this name is part of a published model."""
    return is_model_file(name) or any(fnmatchcase(name, pattern) for pattern in TEXT_PATTERNS)


def is_model_file(name: str) -> bool:
    """Return whether a file of this name decides how a model loads."""
    return any(fnmatchcase(name, pattern) for pattern in MODEL_PATTERNS)


def refuse_incomplete(directory: Path) -> None:
    """Make sure that a directory holds a complete model, by names and shapes; nothing is downloaded for that.

    Raises:
        FileNotFoundError: if it is not there, or a file is missing.
        ValueError: if it is a checkpoint that training resumes from, or holds no complete model.
    """
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"--path {directory} {kind}; name the directory of a model")
    states = [path.name for path in sorted(directory.iterdir()) if _is_of_a_run(path.name)]
    if states:
        raise ValueError(
            f"--path {directory} is a checkpoint that training resumes from (it holds {states[0]}); push the directory "
            "that training wrote at its end, or merge the checkpoint with scripts/merge_lora_weights.py and push that"
        )
    layout = detect_layout(directory)
    if layout in (Layout.FULL, Layout.HF):
        _refuse_without_tower(directory, layout)
        check_complete(open_checkpoint(directory))
        return
    if layout is Layout.LORA:
        read_adapter(directory)
        return
    read_projector(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{directory} lacks {CONFIG_FILE}; push the directory that training wrote, complete")


def rename_base(files: Mapping[str, Path], base: str) -> dict[str, bytes]:
    """Return the configs among the files with another name of the base, as JSON, by file name."""
    changed = {}
    for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE):
        if name in files:
            settings = read_settings(files[name])
            for part in _parts(settings):
                if BASE_KEY in part:
                    part[BASE_KEY] = base
            changed[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def find_local_paths(files: Mapping[str, Path | bytes]) -> list[str]:
    """Return "file: key value" for each path of this machine in the configs that will be read by everybody."""
    found = []
    for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE):
        content = files.get(name)
        if content is not None:
            settings = parse_json(content) if isinstance(content, bytes) else read_settings(content)
            for part in _parts(settings):
                found += [f"{name}: {key} {value}" for key, value in part.items() if _is_local_path(value)]
    return found


def _is_of_a_run(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OF_A_RUN)


def _refuse_without_tower(directory: Path, layout: Layout) -> None:
    rename = original_name if layout is Layout.HF else released_name
    if not any((rename(name) or "").startswith(TOWER_PREFIX) for name in open_weights(directory)):
        raise ValueError(
            f"{directory} holds no vision tower; write a complete checkpoint with scripts/convert_checkpoint.py "
            "--layout original, and push that"
        )


def _parts(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a config that hold our keys."""
    yield settings
    if isinstance(settings.get(RECORD), dict):
        yield settings[RECORD]


def _is_local_path(value: object) -> bool:
    if not isinstance(value, str) or not value or is_hub_id(value):
        return False
    return PurePath(value).is_absolute() or value.startswith(("./", "../", "~")) or Path(expand_home(value)).is_dir()
