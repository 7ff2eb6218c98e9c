"""Licence of a base model: of the released weights from a table, of a directory from its own model card."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import metadata_load

from llava.constants import CARD_FILE
from llava.files.home_directory import expand_home
from llava.files.regular_files import is_file


class Licence(NamedTuple):
    """A licence, and where that is written.

    Attributes:
        identifier: as the hub spells it, such as "apache-2.0".
        source: who says so, for a sentence.
    """

    identifier: str
    source: str


_SOURCE = "the model card of the base"
LLAMA2 = "llama2"
LLAMA2_LINK = "https://github.com/meta-llama/llama/blob/main/LICENSE"
LLAMA2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
NOTICE_FILE = "Notice"
"""Name of the file that the Llama 2 Community License asks for, with `LLAMA2_NOTICE`."""
LLAMA2_BASES = (
    "liuhaotian/llava-v1.5-7b",
    "liuhaotian/llava-v1.5-13b",
    "liuhaotian/llava-v1.5-7b-lora",
    "liuhaotian/llava-v1.5-13b-lora",
    "llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf",
    "lmsys/vicuna-7b-v1.5",
    "lmsys/vicuna-13b-v1.5",
)
"""Ids on the hub whose model cards name the Llama 2 Community License."""


def find_licence(base: str | None) -> Licence | None:
    """Return the licence of a base; None if nothing says which it is.

    Args:
        base: id on the hub, or a directory, whose own model card is read.
    """
    if base is None:
        return None
    if base in LLAMA2_BASES:
        return Licence(LLAMA2, _SOURCE)
    card = Path(expand_home(base)) / CARD_FILE
    try:
        metadata = metadata_load(card) if is_file(card) else None
    except (OSError, ValueError, yaml.YAMLError):  # somebody's own text
        metadata = None
    found = (metadata or {}).get("license")
    return Licence(found, _SOURCE) if isinstance(found, str) and found else None
