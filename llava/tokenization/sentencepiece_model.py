"""Load Llama's sentencepiece vocabulary, `tokenizer.model`."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llava.files.regular_files import MAX_SETTINGS_BYTES, check_content, read_bytes

VOCABULARY_FILE = "tokenizer.model"


def load_pieces(model: bytes, name: str = VOCABULARY_FILE) -> sentencepiece.SentencePieceProcessor:
    """Return a sentencepiece processor that adds no space of its own, from the bytes of `tokenizer.model`.

    Raises:
        ValueError: if the bytes are no sentencepiece model; `name` says where they come from.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        if not proto.HasField("normalizer_spec"):  # it comes after the pieces, so a file cut off between two lacks it
            raise DecodeError("cut off, or no pieces")
        proto.normalizer_spec.add_dummy_prefix = False
        processor.LoadFromSerializedProto(proto.SerializeToString())
    except (DecodeError, RuntimeError) as error:  # of the container, of what is in it
        raise ValueError(f"{name} is damaged ({error}); fetch it again, or copy it from the base model") from error
    return processor


def read_vocabulary(path: Path) -> bytes:
    """Return the bytes of a `tokenizer.model`.

    Raises:
        ValueError: if the file is empty, or something else stands in its place.
    """
    check_content(path)
    return read_bytes(path, most=MAX_SETTINGS_BYTES)
