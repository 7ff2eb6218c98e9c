"""Weights trained beside a LoRA adapter without one, the projector above all: the files of every program."""

from __future__ import annotations

import re
from pathlib import Path

from llava.files.home_directory import expand_home
from llava.model.adapter.tensor_names import plain_name
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import find_weight_file, load_plain_pickle, open_tensor_file, open_weights

NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILE = "mm_projector.bin"
DEEPSPEED_STATES = "global_step*/mp_rank_00_model_states.pt"
"""The whole model in a run's `checkpoint-N`, as DeepSpeed writes it up to ZeRO-2."""
SWIFT_FILE = "vit.safetensors"
"""Vision tower and projector, as ms-swift's example of LoRA with a trained vision tower writes them."""
_WAY_OUT = (
    "merge with --mm-projector naming a directory or file of the projector (the base, to keep the base's), or put "
    "the file that training wrote there"
)


def open_gathered(path: Path) -> LazyTensors:
    """Open a file of tensors, none of which may be empty.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, or a tensor is empty, as ZeRO-3's partitioned parameters are.
    """
    tensors = open_tensor_file(path)
    _refuse_empty(tensors, path)
    return tensors


def _refuse_empty(tensors: LazyTensors, place: str | Path) -> None:
    empty = [name for name, entry in tensors.entries.items() if entry.shape.numel() == 0]
    if empty:
        raise ValueError(
            f"{place}: {len(empty)} of {len(tensors)} tensors are empty, {empty[0]} with shape "
            f"{tuple(tensors.entries[empty[0]].shape)}: DeepSpeed ZeRO-3 partitions parameters, and they were not "
            "gathered before they were saved. Run zero_to_fp32.py in a checkpoint of that run, if you trust "
            "its source (it runs what the files ask for), and put its result here as adapter_model.bin instead of the "
            "files with empty tensors, or train again with "
            "stage3_gather_16bit_weights_on_model_save true or with ZeRO-2"
        )


def read_non_lora(directory: Path, mm_projector: str | Path | None = None, *, is_needed: bool = True) -> LazyTensors:
    """Open the weights trained beside an adapter: a file of their own, or DeepSpeed's states in a `checkpoint-N`.

    Args:
        directory: of the adapter.
        mm_projector: file or directory of a projector, for an adapter directory without one.
        is_needed: whether the projector was trained; False = unknown, so the file may be missing.

    Raises:
        FileNotFoundError: if it is needed and missing: the projector's training would be lost.
        ValueError: if the directory has it and `mm_projector` is given too, or if a file holds no projector.
    """
    path = next((path for name in NON_LORA_FILES if (path := directory / name).is_file()), None)
    tensors = None if path is None else open_tensor_file(path)
    if mm_projector is not None:
        if tensors and all(entry.shape.numel() for entry in tensors.entries.values()):
            raise ValueError(f"{path} is the projector trained with the adapter; leave --mm-projector out")
        return _projector_of(Path(expand_home(mm_projector)))
    if tensors is not None:
        if not tensors:
            raise ValueError(f"{path} holds no tensor, so the projector trained with the adapter is lost; {_WAY_OUT}")
        return open_gathered(path).renamed(plain_name)
    if (directory / SWIFT_FILE).is_file():
        trained = open_gathered(directory / SWIFT_FILE)
        return trained.renamed(lambda name: None if ".lora_" in name else plain_name(name))
    if states := sorted(directory.glob(DEEPSPEED_STATES)):
        return _projector_in_states(states[-1])
    if is_needed:
        raise FileNotFoundError(
            f"{directory} lacks {' or '.join(NON_LORA_FILES)}, which holds the projector trained with the adapter; use "
            f"the directory that training wrote, complete, or {_WAY_OUT}"
        )
    return LazyTensors({})


def read_projector(directory: str | Path) -> LazyTensors:
    """Open `mm_projector.bin` of a directory, or such a file itself, with the released names.

    As in the original, any prefix before `mm_projector.` in the file is ignored, and that part may be left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds anything but a projector.
    """
    path = Path(directory)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    projector = open_gathered(path).renamed(_projector_name)
    other = next((name for name in projector if "mm_projector." not in name), None)
    if other is not None:
        why = " (--mm_use_im_start_end True wrote embeddings too)" if "embed_tokens" in other else ""
        raise ValueError(f"{path} holds {other}; only a projector is supported there{why}")
    return projector


def _projector_name(name: str) -> str:
    is_bare = re.fullmatch(r"(\d+\.)?(weight|bias)", name)
    leaf = name if is_bare else name.rpartition("mm_projector.")[2]
    return name if leaf == name and not is_bare else f"model.mm_projector.{leaf}"


def _projector_of(place: Path) -> LazyTensors:
    """Return the projector in a file, or in a directory of any kind."""
    if place.is_dir():
        files = [place / name for name in (*NON_LORA_FILES, PROJECTOR_FILE)]
        place = next((file for file in files if file.is_file()), place)
    is_weights = place.is_dir() and find_weight_file(place) is not None
    found = _projector_in(open_weights(place) if is_weights else open_tensor_file(place))
    if not found:
        raise ValueError(f"{place} holds no projector; name a file or directory that does")
    _refuse_empty(found, place)
    return found


def _projector_in(tensors: LazyTensors) -> LazyTensors:
    names = {name: plain_name(name) for name in tensors}
    return tensors.renamed(lambda name: names[name] if "mm_projector" in names[name] else None)


def _projector_in_states(path: Path) -> LazyTensors:
    states = load_plain_pickle(path)
    module = states.get("module") if isinstance(states, dict) else None
    projector = {name: tensor for name, tensor in (module or {}).items() if "mm_projector" in name}
    if not projector:
        raise ValueError(f"{path} holds no projector; {_WAY_OUT}")
    found = LazyTensors.of(projector)
    _refuse_empty(found, path)
    return found.renamed(plain_name)
