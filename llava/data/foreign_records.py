"""Convert ShareGPT and OpenAI chat records to LLaVA records where their meaning is unambiguous.

| theirs | ours |
| --- | --- |
| `messages` | `conversations` |
| `images` | `image` |
| `role`, `content` of a turn | `from`, `value` |
| `user`, `assistant` (in any case), `chatgpt`, `model`, `bot` | `human`, `gpt` |
| `content` as a list of text and image parts | text with `<image>` marks |

A name is read only where ours is absent. What is not unambiguous stays as it is, and the checks of records say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.data.supervision import ASSISTANT, HUMAN
from llava.files.terminal_text import show

RECORD_KEYS = ("conversations", "messages")
"""An object with one of them is a record."""

IMAGE_KEYS_NOT_READ = (
    *("image_path", "image_paths", "image_file", "image_files", "image_name", "image_names", "image_url", "image_urls"),
    *("img", "imgs", "img_path", "picture", "pictures", "photo", "photos", "video", "videos", "audio", "audios"),
)
"""Names that other formats give an image or the like; a record with one of them is not about text alone."""

MARKS_NOT_READ = (
    *("<Image>", "<IMAGE>", "<ImageHere>", IMAGE_PLACEHOLDER, "<img>", "<|image|>", "<|image_pad|>", "<video>"),
)
"""Image marks of other models and tools."""

_ROLES = {
    HUMAN: HUMAN,
    ASSISTANT: ASSISTANT,
    "user": HUMAN,
    **dict.fromkeys(("assistant", "chatgpt", "model", "bot"), ASSISTANT),
}
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_PART_NAMES = ("image", "path", "url", "image_url")


def adopt_records(rows: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Convert rows to LLaVA records where their meaning is clear; return them and the names that were replaced.

    Args:
        rows: JSON values; LLaVA records, and what is not a record, stay as they are.
    """
    renamed: dict[str, None] = {}
    return [_adopt(row, renamed) for row in rows], list(renamed)


def _adopt(row: Any, renamed: dict[str, None]) -> Any:
    if not isinstance(row, dict):
        return row
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        return row
    is_known = "conversations" in row and ("image" in row or "images" not in row)
    if is_known and all(isinstance(turn, dict) and turn.get("from") in (HUMAN, ASSISTANT) for turn in turns):
        return row
    adopted = _rename_keys(row, {"messages": "conversations", "images": "image"}, renamed)
    names: list[str] = []
    adopted["conversations"] = [_adopt_turn(turn, names, renamed) for turn in turns]
    if names and "image" not in adopted:
        adopted["image"] = names
        renamed.setdefault("image parts of 'content' as 'image'")
    return adopted


def _adopt_turn(turn: Any, names: list[str], renamed: dict[str, None]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    adopted = _rename_keys(turn, {"role": "from", "content": "value"}, renamed)
    role = adopted.get("from")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is not None and known != role:
        adopted["from"] = known
        renamed.setdefault(f"{show(role)} as {known!r}")
    if isinstance(adopted.get("value"), list):
        adopted["value"] = _join_parts(adopted["value"], names)
    return adopted


def _rename_keys(values: Mapping[str, Any], keys: Mapping[str, str], renamed: dict[str, None]) -> dict[str, Any]:
    """Return an object with its keys renamed, theirs to ours where ours is absent; note what was renamed."""
    adopted = dict(values)
    for theirs, ours in keys.items():
        if ours not in values and theirs in values:
            adopted[ours] = adopted.pop(theirs)
            renamed.setdefault(f"{theirs!r} as {ours!r}")
    return adopted


def _join_parts(content: list[Any], names: list[str]) -> Any:
    """Return the text of a list of parts, and add the names of its images; another list stays as it is."""
    texts, found = [], []
    for part in content:
        if not isinstance(part, Mapping):
            return content
        if part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") in _IMAGE_PARTS:
            texts.append(DEFAULT_IMAGE_TOKEN)
            inner = part["image_url"] if isinstance(part.get("image_url"), Mapping) else part
            found += [inner[key] for key in _PART_NAMES if isinstance(inner.get(key), str)][:1]
        else:
            return content
    names += found
    return "\n".join(texts)
