"""`LlavaLlamaForCausalLM.from_pretrained`: transformers' signature, this code base's loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.model.builder import load_checkpoint
from llava.model.checkpoint.loading_options import read_options
from llava.model.configuration import LlavaConfig

_OF_AUTO_CLASSES = ("adapter_kwargs", "code_revision", "attn_implementation_autoset")
_SETTLED = ("model_type", "architectures", "transformers_version", "dtype", "mm_vision_config")


def load_from_pretrained(
    model_class: type,
    name: str | Path,
    *model_args: Any,
    config: LlavaConfig | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> Any:
    """Return a model of a directory or hub id, in eval mode; see `LlavaLlamaForCausalLM.from_pretrained`.

    Args:
        model_class: `LlavaLlamaForCausalLM` or a class derived from it.
        name: directory or hub id.
        model_args: of a derived class's `__init__`, after the config.
        config: its values replace the directory's.
        device_map: as in `load_pretrained_model`.
        kwargs: options of `load_pretrained_model`, and keys of the config.
    """
    known = vars(LlavaConfig())
    changed = {key: kwargs.pop(key) for key in list(kwargs) if key in known and key not in ("dtype",)}
    if config is not None:
        given = {key: value for key, value in config.to_dict().items() if value is not None and key not in _SETTLED}
        changed = {**given, **changed}
        kwargs.setdefault("attn_implementation", config._attn_implementation)  # where the Auto classes put it
    options = {key: value for key, value in kwargs.items() if key not in _OF_AUTO_CLASSES and not key.startswith("_")}
    options["overwrite_config"] = {**changed, **(options.get("overwrite_config") or {})}
    return load_checkpoint(
        name,
        None,
        read_options(options, caller="from_pretrained"),
        device_map=device_map,
        with_tokenizer=False,  # as in transformers: `save_pretrained` of a model writes none
        model_class=model_class,
        model_args=model_args,
    )[1]
