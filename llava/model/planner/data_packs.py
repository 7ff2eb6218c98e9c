"""Packs of training data for the memory planner, from records alone: images need not be on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.data_files import join_rows, read_files, split_paths
from llava.data.records import EncodedRecord, spliced_length
from llava.data.supervision import encode_example
from llava.model.planner.workload import Packs
from llava.tokenization.llama_tokenizer import LlavaTokenizer

BYTES_PER_TOKEN = 4
"""Of UTF-8 text in Llama's tokenizer, for lengths without a tokenizer."""


class ByteChunks(NamedTuple):
    """Stand-in for a tokenizer: every `BYTES_PER_TOKEN` bytes of text are a token."""

    bos_token_id: int = 1
    add_bos_token: bool = True
    all_special_ids: tuple[int, ...] = ()
    legacy: bool = False

    def encode_text(self, text: str, *, at_start: bool = True) -> list[int]:
        """Return one id for each chunk of bytes; equal chunks have equal ids."""
        data = text.encode("utf-8", errors="replace")
        return [
            int.from_bytes(data[start : start + BYTES_PER_TOKEN], "big")
            for start in range(0, len(data), BYTES_PER_TOKEN)
        ]


def packs_of_data(
    data_path: str, template: str, tokenizer: LlavaTokenizer | ByteChunks, *, patches: int, seed: int = 42
) -> tuple[Packs, int]:
    """Return the packs of data files, and how many of their rows were left out because they are no usable records.

    Args:
        data_path: files of records, as `--data_path` of training.
        template: prompt template.
        tokenizer: of the model, or a stand-in.
        patches: positions of an image.
        seed: of the order of rows.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one can't be read, or no record is usable.
    """
    rows = join_rows(read_files(split_paths(data_path)))
    records = [record for row in rows if (record := _encode(row, template, tokenizer)) is not None]
    if not records:
        raise ValueError(f"{data_path} holds no record that can be trained on; python -m llava.data.doctor says why")
    lengths = [spliced_length(record.input_ids, patches) for record in records]
    return Packs.of_records(records, lengths, seed), len(rows) - len(records)


def _encode(row: Any, template: str, tokenizer: LlavaTokenizer | ByteChunks) -> EncodedRecord | None:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        return None
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    try:
        ids, labels = encode_example(row["conversations"], template, tokenizer)
    except ValueError:
        return None
    return EncodedRecord(ids, labels, [Path(name) for name in names])
