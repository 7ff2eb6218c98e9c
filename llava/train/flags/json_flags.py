"""Read flags whose value is JSON: text that starts with `{`, or the path of a file."""

from __future__ import annotations

from typing import Any

from llava.files.json_files import parse_json
from llava.files.regular_files import MAX_SETTINGS_BYTES, read_text

JSON_FILE_FLAGS = {  # text or a file -> what to do
    "deepspeed": "use scripts/zero2.json",
    "fsdp_config": "give a JSON file, or text like '{\"reshard_after_forward\": true}'",
    "accelerator_config": "give a JSON file, or text like '{\"even_batches\": true}'",
}
_REENTRANT = "give text like '{\"use_reentrant\": false}'"
_TEXT_FLAGS = {  # text alone -> what to do
    "lr_scheduler_kwargs": "give text like '{\"num_cycles\": 2}'",
    "gradient_checkpointing_kwargs": _REENTRANT,
    "activation_checkpointing_kwargs": _REENTRANT,
}
JSON_FLAGS = JSON_FILE_FLAGS | _TEXT_FLAGS


def read_json_flag(flag: str, value: Any) -> dict[str, Any]:
    """Return the JSON object of a flag's value; {} without a value.

    Args:
        flag: name, without dashes; a key of `JSON_FLAGS`.
        value: text, path or content.

    Raises:
        ValueError: if it can't be read or is not a JSON object; flag and value are named.
    """
    if not value:
        return {}
    if not isinstance(value, str):
        return value if isinstance(value, dict) else {}  # a library's own object
    hint, needs_text = JSON_FLAGS[flag], flag in _TEXT_FLAGS
    flag = flag.replace("activation_", "gradient_")  # as scripts write it, whatever this version calls it
    is_text = value.lstrip().startswith("{")
    if needs_text and not is_text:
        raise ValueError(f"--{flag} {value} is not a JSON object; {hint}")
    try:
        content = parse_json(value if is_text else read_text(value, most=MAX_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {value} can't be read ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--{flag} {value} holds no JSON object; {hint}")
    return content
