"""Convert sentencepiece's `tokenizer.model` to the `tokenizer.json` of `tokenizers` and back, id for id.

sentencepiece joins the two neighbours whose joined piece has the highest score, the leftmost among equals; the engine
joins the pair that stands first in a list. transformers 5 orders that list by ids instead of scores and leaves out or
moves spaces; the files written here give the ids that `LlavaTokenizer` gives.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AddedToken

from llava.files.json_files import read_settings

TOKENIZER_JSON_FILE = "tokenizer.json"
SPACE = "▁"
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"
_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_WAY_OUT = "put the base model's tokenizer.model beside it"


def sentencepiece_from_json(path: str | Path) -> bytes:
    """Rebuild the `tokenizer.model` that a `tokenizer.json` was made from.

    Added tokens beyond the vocabulary (`<image>`, `<pad>`) are not pieces and stay out. Merges that make or use special
    or byte pieces stay out too: some converters list them, sentencepiece never joins them.

    Args:
        path: of a `tokenizer.json` whose model is BPE with byte fallback, as Llama's is.

    Returns:
        a serialised sentencepiece `ModelProto` that keeps every space.

    Raises:
        ValueError: if the file holds no such model, or its merges are not those of any sentencepiece model.
    """
    path = Path(path)
    settings = read_settings(path)
    model = settings.get("model")
    has_parts = isinstance(model, dict) and isinstance(model.get("vocab"), dict) and "merges" in model
    if not has_parts or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(f"{path} is not BPE with byte fallback, as Llama's vocabulary is; {_WAY_OUT}")
    vocabulary: dict[str, int] = model["vocab"]
    if not all(type(index) is int for index in vocabulary.values()):
        raise ValueError(f"{path}: its vocabulary has ids that are not whole numbers; {_WAY_OUT}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"{path}: the ids of its vocabulary are not 0 to {len(vocabulary) - 1}; {_WAY_OUT}")
    unknown = model.get("unk_token") or _UNKNOWN
    if not isinstance(unknown, str):
        raise ValueError(f"{path}: unk_token is {unknown!r:.60}, not a text; {_WAY_OUT}")
    missing = [piece for piece in (unknown, *_BYTES) if piece not in vocabulary]
    if missing:
        raise ValueError(f"{path}: its vocabulary has no {missing[0]!r}; {_WAY_OUT}")
    kinds = dict.fromkeys(_BYTES, _PIECE.BYTE)
    kinds |= {token.content: _PIECE.CONTROL for token in added_tokens_of_json(path).values() if token.special}
    kinds[unknown] = _PIECE.UNKNOWN
    normal = {piece for piece in vocabulary if piece not in kinds}
    merges = [_read_merge(merge, path) for merge in _list_of(model["merges"], path)]
    scores = _scores_of_merges([pair for pair in merges if {*pair, "".join(pair)} <= normal], normal, path)
    proto = _empty_proto(vocabulary, unknown)
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        proto.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=kinds.get(piece, _PIECE.NORMAL))
    return proto.SerializeToString()


def _list_of(merges: Any, path: Path) -> list[Any]:
    if not isinstance(merges, list):
        raise ValueError(f"{path}: its merges are {merges!r:.60}, not a list; {_WAY_OUT}")
    return merges


def _read_merge(merge: Any, path: Path) -> tuple[str, str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
        raise ValueError(f"{path}: {merge!r:.60} is not a merge of two pieces; {_WAY_OUT}")
    return pair[0], pair[1]


def added_tokens_of_json(path: str | Path) -> dict[int, AddedToken]:
    """Return the special and added tokens of a `tokenizer.json` by id.

    Raises:
        ValueError: if the file holds no JSON object.
    """
    path = Path(path)
    tokens = read_settings(path).get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise ValueError(f"{path}: added_tokens is {tokens!r:.60}, not a list of objects; {_WAY_OUT}")
    return {token_id(token.get("id"), path): read_token(token, path) for token in tokens}


def token_id(value: Any, path: Path) -> int:
    """Return the id of an added token, which is the key of some files as text.

    Raises:
        ValueError: if it is not a number that an id can be.
    """
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"{path}: {value!r:.60} is not a token id; {_WAY_OUT}")
    return int(text)


def read_token(token: Any, path: Path, **flags: bool) -> AddedToken:
    """Return an added token as files of tokenizers write it; `flags` instead of its own.

    Raises:
        ValueError: if it is not an object of a text and flags.
    """
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    values = {name: token[name] for name in names if name in token} if isinstance(token, dict) else {}
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not content or not all(isinstance(value, bool) for value in values.values()):
        raise ValueError(f"{path}: {token!r:.60} is not an added token, a text and flags; {_WAY_OUT}")
    return AddedToken(content, **{**values, **flags})


def puts_space_after_special_tokens(path: str | Path) -> bool:
    """Return whether a `tokenizer.json` puts a space before text after `</s>`, as Llama's `legacy` behaviour does.

    It is tried, not read: converters have written the same rule in several ways.

    Raises:
        ValueError: if the engine can't read the file.
    """
    tokens = _load_engine(read_settings(Path(path)), path).encode(f"a{_END}a", add_special_tokens=False).tokens
    return tokens[-1].startswith(SPACE)


def _load_engine(settings: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """Return the engine of a file's content.

    Raises:
        ValueError: if the engine can't read it.
    """
    try:
        return Tokenizer.from_str(json.dumps(settings))
    except Exception as error:  # the engine raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({error}); {_WAY_OUT}") from error


def tokenizer_json(
    model: bytes,
    added_tokens: Mapping[int, AddedToken],
    *,
    legacy: bool,
    begin: tuple[str, int] | None,
    end: tuple[str, int] | None,
    text_starts_after: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that encodes as `LlavaTokenizer` does.

    Args:
        model: the bytes of `tokenizer.model`.
        added_tokens: special and added tokens by id.
        legacy: True = text after any added token gets a space before it; False = only text at the start and after
            the tokens of `text_starts_after`.
        begin: token and id put before every text, or None.
        end: token and id put after every text, or None.
        text_starts_after: added tokens that part a text in texts of their own, such as `<image>`.

    Raises:
        ValueError: if different pieces have the same score, so that no list of merges has their order, or the ids of
            added tokens leave gaps, which the engine would close.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    outside = [index for index in sorted(added_tokens) if index >= len(proto.pieces)]
    if outside != list(range(len(proto.pieces), len(proto.pieces) + len(outside))):
        raise ValueError(f"added tokens have ids {outside}; let them follow each other from {len(proto.pieces)}")
    # The engine finds tokens that are not "normalized" first and prepares the text between them piece by piece; it
    # finds the others in the prepared text, so that no space comes after these.
    parting = [token.content for token in added_tokens.values() if legacy or token.content in text_starts_after]
    inside = [token.content for token in added_tokens.values() if token.content not in parting]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, token, normalized=token.content in inside)
            for index, token in sorted(added_tokens.items())
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(inside)},
        "pre_tokenizer": None,
        "post_processor": _post_processor(begin, end),
        "decoder": _DECODER,
        "model": _bpe_model(proto.pieces),
    }


def _bpe_model(pieces: Sequence[Any]) -> dict[str, Any]:
    """Return the engine's model of a sentencepiece model's pieces."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in pieces if piece.type == _PIECE.UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(pieces)},
        "merges": _merges({piece.piece: piece.score for piece in pieces if piece.type == _PIECE.NORMAL}),
    }


def _scores_of_merges(merges: Sequence[tuple[str, str]], normal: set[str], path: Path) -> dict[str, float]:
    """Return a score for each piece, such that higher scores are joined where the list has its pairs earlier.

    Raises:
        ValueError: if pairs of different pieces alternate, or a pair that would make a piece is not in the list.
    """
    listed = set(merges)
    absent = next((pair for piece in sorted(normal) for pair in _pairs(piece, normal) if pair not in listed), None)
    if absent:
        raise ValueError(f"{path}: {absent[0]!r} and {absent[1]!r} make a piece, but no merge says so; {_WAY_OUT}")
    last = {"".join(pair): index for index, pair in enumerate(merges)}
    scores: dict[str, float] = {}
    group: list[str] = []
    group_end = -1
    for index, pair in enumerate(merges):
        piece = "".join(pair)
        if piece in scores:
            continue
        group = [*group, piece] if index < group_end else [piece]
        if len(group) > 1 and not _are_runs(group):
            raise ValueError(f"{path}: its merges make {group[0]!r} and {piece!r} by turns; {_WAY_OUT}")
        scores[piece] = scores[group[0]] if len(group) > 1 else -float(len(scores))
        group_end = max(group_end, last[piece])
    lowest = -float(len(scores))
    return {piece: scores.get(piece, lowest) for piece in normal}


def _merges(scores: Mapping[str, float]) -> list[str] | list[tuple[str, str]]:
    """Return the pairs that make each piece, best first.

    A pair is a text with a space between, which every version of the engine reads; before 0.20 it reads nothing else.

    Raises:
        ValueError: if different pieces have the same score, unless they repeat one character: there the longer first
            is what leftmost first comes to.
    """
    made = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: (-scores[piece], -len(piece)))
    for piece, other in itertools.pairwise(made):
        if scores[piece] == scores[other] and not _are_runs([piece, other]):
            raise ValueError(
                f"pieces {piece!r} and {other!r} have the same score, so no list of merges has their order"
            )
    pairs = [pair for piece in made for pair in sorted(_pairs(piece, scores), key=_overlap_order)]
    return pairs if any(" " in piece for piece in scores) else [" ".join(pair) for pair in pairs]


def _overlap_order(pair: tuple[str, str]) -> tuple[bool, int]:
    """Order the pairs of one piece so that of two that share a neighbour the left one comes first."""
    left, right = pair
    return not (left + right).startswith(right), -len(left)


def _pairs(piece: str, pieces: Container[str]) -> list[tuple[str, str]]:
    halves = ((piece[:index], piece[index:]) for index in range(1, len(piece)))
    return [(left, right) for left, right in halves if left in pieces and right in pieces]


def _are_runs(pieces: Sequence[str]) -> bool:
    return len({character for piece in pieces for character in piece}) == 1


def _empty_proto(vocabulary: Mapping[str, int], unknown: str) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.unk_piece = vocabulary[unknown], unknown
    trainer.bos_id, trainer.eos_id = vocabulary.get(_BEGIN, -1), vocabulary.get(_END, -1)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto


def _added_token(index: int, token: AddedToken, *, normalized: bool) -> dict[str, Any]:
    """Return an added token that is found anywhere and takes no space with it, as `LlavaTokenizer` finds it."""
    whole = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": token.content, **whole, "normalized": normalized, "special": token.special}


def _normalizers(inside: Sequence[str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    if inside:  # a text that begins with one of these has no stretch before it that could take the space
        marks = "|".join(re.escape(mark) for mark in sorted(inside, key=len, reverse=True))
        start = r"(?<![\s\S])"  # of the text: the engine's ^ is the start of any line
        steps.append({"type": "Replace", "pattern": {"Regex": f"{start}{SPACE}(?={marks})"}, "content": ""})
    return steps


def _post_processor(begin: tuple[str, int] | None, end: tuple[str, int] | None) -> dict[str, Any]:
    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": type_id}}
        marks = [mark and {"SpecialToken": {"id": mark[0], "type_id": type_id}} for mark in (begin, end)]
        return [part for part in (marks[0], text, marks[1]) if part]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            mark[0]: {"id": mark[0], "ids": [mark[1]], "tokens": [mark[0]]} for mark in (begin, end) if mark
        },
    }
