"""What training leaves behind: directories that are complete, in the original's layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llava.image_processing import CLIPPixels
from llava.model.adapter import ADAPTER_CONFIG_FILE, ADAPTER_FILES, NON_LORA_FILES, PEFT_PREFIX, PROJECTOR_FILE
from llava.model.checkpoint import save_checkpoint, save_settings, state_for_file
from llava.model.configuration import LlavaConfig
from llava.model.vision_tower import released_name
from llava.model.weight_writer import save_tensors
from llava.model.weights import open_tensor_file, open_weights
from llava.tokenization import LlavaTokenizer

TRAINING_FILE = "training.json"
_PICKLED_NON_LORA_FILE = NON_LORA_FILES[1]
"""Pickled, as is the projector's file: the original's loader reads these names alone. Only tensors are inside."""
_ADAPTER_NAME = "default"
"""peft's name for a model's only adapter; it is part of parameters' names, but not of those in files."""


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What stands beside the weights.

    Attributes:
        config: to be written; names the base and its fingerprint.
        tokenizer: of the model.
        image_processor: of the model.
        training: text of `training.json`, the run's flags.
    """

    config: LlavaConfig
    tokenizer: LlavaTokenizer
    image_processor: CLIPPixels
    training: str


def gather_parameters(model: nn.Module, *, trainable_only: bool) -> dict[str, Tensor]:
    """Return parameters on the CPU, whole even where ZeRO-3 keeps parts; every process must call it.

    Args:
        model: unwrapped.
        trainable_only: leave out those that don't learn.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with _whole(parameter):
                tensor = parameter.detach()
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                state[name] = whole.cpu().clone()
    return state


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, of which FSDP may keep a part here; every process must call it."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def stored_name(name: str) -> str:
    """Return a parameter's name in the files: peft's without the adapter's, the encoder's as released."""
    if "lora_" in name:
        short = name.replace(f".{_ADAPTER_NAME}.", ".")
        return short.removesuffix(".weight") if "lora_magnitude_vector" in short else short
    inner = name.removeprefix(PEFT_PREFIX)
    return name[: len(name) - len(inner)] + released_name(inner)


@contextlib.contextmanager
def _whole(parameter: nn.Parameter, *, is_changed: bool = False) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):  # DeepSpeed marks partitioned parameters with it
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if is_changed else None):
        yield


class Saver:
    """Writes and restores what a run trains.

    Args:
        model: unwrapped, `requires_grad` set; a `peft.PeftModel` for LoRA.
        beside: what stands beside the weights.
        kind: "lora", "projector" or "full".
        dtype: of full weights in the result.
    """

    def __init__(self, model: nn.Module, beside: Surroundings, kind: str, dtype: torch.dtype) -> None:
        self.model, self.beside, self.kind, self.dtype = model, beside, kind, dtype

    def gather(self) -> dict[str, Tensor]:
        """Return the parameters that `save` needs, whole; every process must call it."""
        return gather_parameters(self.model, trainable_only=self.kind != "full")

    def save(self, state: Mapping[str, Tensor], directory: Path, *, is_result: bool = True) -> None:
        """Write a complete directory into an empty one.

        Args:
            state: from `gather`.
            directory: to be filled.
            is_result: full weights are cast to the run's dtype; those of a checkpoint keep the precision they learn in,
                else a resumed run would go on from rounded weights.
        """
        beside = self.beside
        if self.kind == "full":
            tensors = state_for_file(self.model, state)
            dtype = self.dtype if is_result else None
            save_checkpoint(tensors, beside.config, beside.tokenizer, beside.image_processor, directory, dtype=dtype)
        else:
            if self.kind == "lora":
                self._save_lora(state, directory)
            else:
                save_tensors(state, directory / PROJECTOR_FILE)
            save_settings(beside.config, beside.tokenizer, beside.image_processor, directory)
        (directory / TRAINING_FILE).write_text(beside.training, encoding="utf-8")

    def _save_lora(self, state: Mapping[str, Tensor], directory: Path) -> None:
        of_adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}  # peft would add biases
        adapter = peft.get_peft_model_state_dict(self.model, state_dict=of_adapters)
        save_tensors(adapter, directory / ADAPTER_FILES[0])
        settings = self.model.peft_config[self.model.active_adapter].to_dict()
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        settings["inference_mode"] = True
        text = json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
        (directory / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
        others = {stored_name(name): tensor for name, tensor in state.items() if name not in of_adapters}
        save_tensors(others, directory / _PICKLED_NON_LORA_FILE)

    @torch.no_grad()
    def restore(self, directory: Path) -> None:
        """Load the parameters that learn from a directory that `save` wrote.

        Raises:
            ValueError: if one of them is not there.
        """
        found = self._read(directory)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                stored = stored_name(name)
                if stored not in found:
                    raise ValueError(
                        f"{directory} lacks {stored}, which this run trains; start anew in another --output_dir"
                    )
                with _whole(parameter, is_changed=True):
                    fill(parameter, found[stored])

    def _read(self, directory: Path) -> Mapping[str, Tensor]:
        if self.kind == "full":
            return open_weights(directory)
        if self.kind == "projector":
            return open_tensor_file(directory / PROJECTOR_FILE)
        others = open_tensor_file(directory / _PICKLED_NON_LORA_FILE)
        return open_tensor_file(directory / ADAPTER_FILES[0]).overlaid(others.entries)


@contextlib.contextmanager
def filled_at_the_end(directory: str | Path) -> Iterator[Path]:
    """Yield an empty hidden directory inside `directory`; its files move there once all of them are written."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    hidden = target / ".writing"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        yield hidden
        for path in sorted(hidden.iterdir()):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
