"""Read and write `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from llava.files.json_files import read_settings, write_settings
from llava.tokenization.tokenizer_json import (
    TOKENIZER_JSON_FILE,
    added_tokens_of_json,
    read_token,
    token_id,
    tokenizer_json,
)

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
LLAMA_CLASS = "LlamaTokenizer"
"""By which transformers finds its own tokenizer for these files."""
TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
SPECIAL_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")


def special_tokens(tokenizer: PreTrainedTokenizer) -> dict[str, str]:
    """Return the content of `special_tokens_map.json`: the tokens by their roles."""
    return {role: getattr(tokenizer, role) for role in SPECIAL_ROLES if getattr(tokenizer, role)}


def tokenizer_settings(
    tokenizer: PreTrainedTokenizer, added: Mapping[int, AddedToken], special: Mapping[str, str], class_name: str
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json` of a `LlavaTokenizer`."""
    return {
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "added_tokens_decoder": {
            str(index): {field: getattr(token, field) for field in TOKEN_FIELDS}
            for index, token in sorted(added.items())
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": tokenizer.legacy,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "tokenizer_class": class_name,
    }


def write_engine(
    tokenizer: PreTrainedTokenizer,
    directory: Path,
    added: Mapping[int, AddedToken],
    special: Mapping[str, str],
    class_name: str,
    text_starts_after: Sequence[str] = (),
) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that belongs to it.

    Args:
        tokenizer: a `LlavaTokenizer`.
        directory: an existing one.
        added: special and added tokens by id.
        special: from `special_tokens`.
        class_name: by which transformers chooses its tokenizer.
        text_starts_after: see `tokenizer_json`.

    Raises:
        ValueError: if no `tokenizer.json` can say what the vocabulary does.
    """
    engine = tokenizer_json(
        tokenizer.vocabulary_bytes,
        added,
        legacy=tokenizer.legacy,
        begin=(tokenizer.bos_token, tokenizer.bos_token_id) if tokenizer.add_bos_token else None,
        end=(tokenizer.eos_token, tokenizer.eos_token_id) if tokenizer.add_eos_token else None,
        text_starts_after=text_starts_after,
    )
    # transformers changes each token's flags to what stands in tokenizer_config.json, so both files say the same
    flags = {token["id"]: AddedToken(**{key: token[key] for key in TOKEN_FIELDS}) for token in engine["added_tokens"]}
    write_settings(engine, directory / TOKENIZER_JSON_FILE)
    write_settings(tokenizer_settings(tokenizer, flags, special, class_name), directory / TOKENIZER_CONFIG_FILE)


def added_tokens(directory: Path, settings: Mapping[str, Any], rows: int | None) -> dict[int, AddedToken]:
    """Collect added tokens from the files that have listed them in one release or another, the newest first."""
    listed = settings.get("added_tokens_decoder") or {}
    place = directory / TOKENIZER_CONFIG_FILE
    if not isinstance(listed, dict):
        raise ValueError(f"{place}: added_tokens_decoder is {listed!r:.60}, not an object; fetch the file again")
    # Whether a token is found before or after normalising makes no difference here: nothing is normalised.
    added = {token_id(index, place): read_token(token, place, normalized=False) for index, token in listed.items()}
    engine = directory / TOKENIZER_JSON_FILE
    for index, token in (added_tokens_of_json(engine) if engine.is_file() else {}).items():
        added.setdefault(index, token)
    for content, index in read_json(directory / ADDED_TOKENS_FILE).items():
        added.setdefault(token_id(index, directory / ADDED_TOKENS_FILE), AddedToken(content, special=True))
    return {index: token for index, token in added.items() if rows is None or index < rows}


def check_settings(settings: Mapping[str, Any], place: Path) -> None:
    """Check the values of `tokenizer_config.json` that decide token ids.

    Raises:
        ValueError: if one is of another kind.
    """
    for key in ("legacy", "add_bos_token", "add_eos_token"):
        if not isinstance(settings.get(key, True), bool):
            raise ValueError(f"{place}: {key} is {settings[key]!r:.60}, not true or false; fetch the file again")
    length = settings.get("model_max_length", 1)
    if not isinstance(length, int | float) or isinstance(length, bool) or length < 0:
        raise ValueError(f"{place}: model_max_length is {length!r:.60}, not a number of tokens; fetch the file again")
    if (side := settings.get("padding_side", "right")) not in ("left", "right"):
        raise ValueError(f"{place}: padding_side is {side!r:.60}, not left or right; fetch the file again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without its nulls, which say nothing; a missing file says nothing either."""
    return {key: value for key, value in (read_settings(path) if path.is_file() else {}).items() if value is not None}


def token_text(token: Any, place: Path) -> str:
    """Return a token's text, which some releases write with flags around it.

    Raises:
        ValueError: if it is neither; `place` is the file.
    """
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"{place}: {token!r:.60} is not a token; fetch the file again")
    return content
