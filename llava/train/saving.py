"""Write and restore the trainable parameters as complete checkpoints, in the original's layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llava.clip_image_processor import CLIPPixels
from llava.constants import TRAINING_FILE
from llava.model.adapter.adapter_config import ADAPTER_CONFIG_FILE
from llava.model.adapter.lora import ADAPTER_FILES
from llava.model.adapter.non_lora import NON_LORA_FILES, PROJECTOR_FILE
from llava.model.adapter.tensor_names import PEFT_PREFIX
from llava.model.checkpoint.checkpoint import save_checkpoint, save_settings, state_for_file
from llava.model.checkpoint.read_tensors import WEIGHT_FILES, open_tensor_file, open_weights
from llava.model.checkpoint.write_tensors import save_tensors
from llava.model.configuration import LlavaConfig
from llava.model.vision_tower import released_name
from llava.tokenization.llama_tokenizer import LlavaTokenizer
from llava.train.output_files import STAGING_FOLDER

_PICKLED_NON_LORA_FILE = NON_LORA_FILES[1]
"""Pickled, as is the projector's file: the original's loader reads these names alone. Both hold only tensors."""
PROJECTOR_PREFIX = "model.mm_projector."
_ADAPTER_NAME = "default"
"""peft's name for a model's only adapter; parameters carry it in their names, files don't."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Content of a checkpoint apart from its weights.

    Attributes:
        config: names the base and its fingerprint.
        tokenizer: of the model.
        image_processor: of the model.
        training: text of `training.json`, the run's flags.
    """

    config: LlavaConfig
    tokenizer: LlavaTokenizer
    image_processor: CLIPPixels
    training: str


def gather_parameters(
    model: nn.Module, *, trainable_only: bool, is_kept: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """Return full parameters on the CPU, gathered where ZeRO-3 or FSDP shards them; every rank must call it.

    Args:
        model: unwrapped.
        trainable_only: leave out frozen parameters.
        is_kept: tells by name which frozen parameters are returned all the same.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only or is_kept(name):
            state[name] = whole_tensor(parameter)
    return state


def whole_tensor(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter on the CPU, gathered where ZeRO-3 or FSDP shards it; every rank must call it."""
    with _gathered(parameter):
        tensor = parameter.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.cpu().clone()


def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Copy a full tensor into a parameter that FSDP may shard; every rank must call it."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def stored_name(name: str) -> str:
    """Return a parameter's name in the files: peft's without the adapter's name, the vision tower's as released."""
    if "lora_" in name:
        short = name.replace(f".{_ADAPTER_NAME}.", ".")
        return short.removesuffix(".weight") if "lora_magnitude_vector" in short else short
    inner = name.removeprefix(PEFT_PREFIX)
    return name[: len(name) - len(inner)] + released_name(inner)


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter, *, is_changed: bool = False) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):  # ZeRO-3 marks sharded parameters with it
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if is_changed else None):
        yield


class Saver:
    """Writes and restores the trainable parameters of a run.

    Args:
        model: unwrapped, `requires_grad` set; a `peft.PeftModel` for LoRA.
        metadata: rest of the checkpoint.
        kind: "lora", "projector" or "full".
        dtype: of full weights in the result.
        changed_before: released names of the weights in which a LoRA run's start differs from its base.
    """

    def __init__(
        self,
        model: nn.Module,
        metadata: CheckpointMetadata,
        kind: str,
        dtype: torch.dtype,
        changed_before: Collection[str] = (),
    ) -> None:
        self.model, self.metadata, self.kind, self.dtype = model, metadata, kind, dtype
        self.changed_before = frozenset(changed_before)

    def gather(self) -> dict[str, Tensor]:
        """Return the full parameters that `save` needs; every rank must call it."""
        is_kept = self._goes_with_adapter if self.kind == "lora" else lambda name: False
        return gather_parameters(self.model, trainable_only=self.kind != "full", is_kept=is_kept)

    def _goes_with_adapter(self, name: str) -> bool:
        """Tell whether a frozen weight is saved with the adapter: the projector, and all that differs from the base."""
        name = released_name(name.removeprefix(PEFT_PREFIX))
        return name.startswith(PROJECTOR_PREFIX) or name in self.changed_before

    def save(self, state: Mapping[str, Tensor], directory: Path, *, is_result: bool = True) -> None:
        """Write a complete checkpoint into an empty directory.

        Args:
            state: from `gather`.
            directory: exists.
            is_result: cast full weights to the run's dtype; a checkpoint to resume from keeps the precision in which
                they are trained, else the resumed run would start from rounded weights.
        """
        metadata = self.metadata
        if self.kind == "full":
            tensors = state_for_file(self.model, state)
            dtype = self.dtype if is_result else None
            parts = metadata.config, metadata.tokenizer, metadata.image_processor
            save_checkpoint(tensors, *parts, directory, dtype=dtype)
        else:
            if self.kind == "lora":
                self._save_lora(state, directory)
            else:
                save_tensors(state, directory / PROJECTOR_FILE)
            save_settings(metadata.config, metadata.tokenizer, metadata.image_processor, directory)
        (directory / TRAINING_FILE).write_text(metadata.training, encoding="utf-8")

    def _save_lora(self, state: Mapping[str, Tensor], directory: Path) -> None:
        of_adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}  # peft would add biases
        # peft would look for resized embeddings in the base, on the hub too; the state holds none.
        adapter = peft.get_peft_model_state_dict(self.model, state_dict=of_adapters, save_embedding_layers=False)
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
        """Load the trainable parameters from a directory that `save` wrote.

        Raises:
            ValueError: if one of them is missing.
        """
        found = self._read(directory)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                stored = stored_name(name)
                if stored not in found:
                    raise ValueError(
                        f"{directory} lacks {stored}, which this run trains; start over in another --output_dir"
                    )
                with _gathered(parameter, is_changed=True):
                    copy_into(parameter, found[stored])

    def _read(self, directory: Path) -> Mapping[str, Tensor]:
        if self.kind == "full":
            return open_weights(directory)
        if self.kind == "projector":
            return open_tensor_file(directory / PROJECTOR_FILE)
        others = open_tensor_file(directory / _PICKLED_NON_LORA_FILE)
        return open_tensor_file(directory / ADAPTER_FILES[0]).overlaid(others.entries)


@contextlib.contextmanager
def atomic_fill(directory: str | Path) -> Iterator[Path]:
    """Yield an empty hidden directory; its files move to `directory` once all of them are written."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    hidden = target / STAGING_FOLDER
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        yield hidden
        written = sorted(hidden.iterdir())
        for path in written:
            path.replace(target / path.name)
        entries = {path.name for path in written}.intersection(WEIGHT_FILES)
        for name in set(WEIGHT_FILES).difference(entries) if entries else ():
            (target / name).unlink(missing_ok=True)  # an earlier run's weights would be read instead of these
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
