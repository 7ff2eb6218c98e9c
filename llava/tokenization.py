"""Llama's sentencepiece tokenizer, id for id as Vicuna and LLaVA-1.5 were trained with it.

transformers 5 converts `tokenizer.model` to another engine, which gives other ids around leading and double spaces;
this one calls sentencepiece itself. Source of the rules for spaces: transformers 4.37's `LlamaTokenizer`, `legacy`
included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, PreTrainedTokenizer

from llava.files import read_settings

VOCABULARY_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPACE = "▁"
_SPECIAL_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")


class LlavaTokenizer(PreTrainedTokenizer):
    """Text to token ids and back.

    Args:
        vocab_file: path of `tokenizer.model`.
        legacy: True = a space is put before every stretch of text, also behind a special token; False = before the
            first only. Vicuna-1.5 says False in its `tokenizer_config.json`; files that say nothing mean True.
        add_bos_token: begin every encoded text with `<s>`.
        add_eos_token: end every encoded text with `</s>`.
        kwargs: what `transformers.PreTrainedTokenizer` takes (special tokens, `model_max_length` in tokens, ...).

    Raises:
        ValueError: if the vocabulary drops or merges spaces while normalising, which Llama's never does.
    """

    vocab_files_names: ClassVar = {"vocab_file": VOCABULARY_FILE}

    def __init__(
        self,
        vocab_file: str,
        *,
        legacy: bool = True,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = str(vocab_file)
        self.legacy = legacy
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.vocabulary_bytes = Path(vocab_file).read_bytes()
        self._pieces = load_pieces(self.vocabulary_bytes)
        if self._pieces.decode(self._pieces.encode("  a  b ")) != "  a  b ":
            raise ValueError(f"{vocab_file}: this sentencepiece model changes spaces, so it is not a Llama tokenizer")
        for role, default in zip(_SPECIAL_ROLES, ("<unk>", "<s>", "</s>", None), strict=True):
            kwargs.setdefault(role, default)
        super().__init__(
            legacy=legacy,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            special_tokens_pattern="none",
            **kwargs,
        )
        self._split_at = self._compile_splitter()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pieces"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pieces = load_pieces(self.vocabulary_bytes)

    @property
    def vocab_size(self) -> int:
        """Number of sentencepiece pieces, without added tokens."""
        return self._pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Return every piece and added token with its id."""
        vocabulary = {self._pieces.id_to_piece(index): index for index in range(self.vocab_size)}
        return {**vocabulary, **self.get_added_vocab()}

    def encode_text(self, text: str, *, at_start: bool = True) -> list[int]:
        """Encode without `<s>` and `</s>`.

        Args:
            text: any text; special and added tokens written in it become their ids.
            at_start: False for text that continues an already encoded one, so that no space is put before it.

        Returns:
            token ids.

        Raises:
            UnicodeEncodeError: if the text holds half of a surrogate pair, which is no character.
        """
        ids: list[int] = []
        for index, stretch in enumerate(self._split_at.split(text)):
            if index % 2:
                ids.append(self.convert_tokens_to_ids(stretch))
            elif stretch:
                prefix = SPACE if (self.legacy if index else at_start) else ""
                ids.extend(self._pieces.encode((prefix + stretch.replace(SPACE, " ")).encode()))
        return ids

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a text into pieces; `kwargs` are accepted for transformers' sake and have no effect."""
        return self.convert_ids_to_tokens(self.encode_text(text))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put `<s>` before and `</s>` behind each text, as configured."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        second = [] if token_ids_1 is None else start + token_ids_1 + end
        return start + token_ids_0 + end + second

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces to text; the space that encoding put before the first is taken off."""
        text, run = "", []
        for token in tokens:
            if token in self.all_special_tokens or token in self.added_tokens_encoder:
                text += self._join(run, at_start=not text) + token
                run = []
            else:
                run.append(token)
        return text + self._join(run, at_start=not text)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `tokenizer.model` byte for byte and return its path."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCABULARY_FILE}"
        path.write_bytes(self.vocabulary_bytes)
        return (str(path),)

    def _join(self, pieces: list[str], *, at_start: bool) -> str:
        text = self._pieces.decode(pieces) if pieces else ""
        return text[1:] if at_start and text.startswith(" ") else text

    def _compile_splitter(self) -> re.Pattern[str]:
        marks = {*self.all_special_tokens, *(token.content for token in self.added_tokens_decoder.values())}
        return re.compile("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")")

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        self._split_at = self._compile_splitter()
        return added

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces.id_to_piece(index)


def load_pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return a sentencepiece processor that adds no space of its own, from the bytes of `tokenizer.model`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def load_tokenizer(directory: str | Path) -> LlavaTokenizer:
    """Load the tokenizer of a checkpoint directory.

    Raises:
        FileNotFoundError: if `tokenizer.model` is missing.
        ValueError: if one of its JSON files holds no object.
    """
    directory = Path(directory)
    vocabulary = directory / VOCABULARY_FILE
    if not vocabulary.is_file():
        raise FileNotFoundError(
            f"{directory}: {VOCABULARY_FILE} is missing; copy it there from the base model's directory"
        )
    settings = _read_json(directory / TOKENIZER_CONFIG_FILE)
    special = {**_read_json(directory / SPECIAL_TOKENS_FILE), **settings}
    added = {int(index): AddedToken(**token) for index, token in settings.get("added_tokens_decoder", {}).items()}
    for content, index in _read_json(directory / ADDED_TOKENS_FILE).items():
        added.setdefault(index, AddedToken(content, special=True))
    return LlavaTokenizer(
        str(vocabulary),
        legacy=settings.get("legacy") is not False,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        model_max_length=settings.get("model_max_length") or int(1e30),
        padding_side=settings.get("padding_side") or "right",
        added_tokens_decoder=added,
        clean_up_tokenization_spaces=False,
        **{role: _content(special[role]) for role in _SPECIAL_ROLES if special.get(role)},
    )


def save_tokenizer(tokenizer: LlavaTokenizer, directory: str | Path) -> None:
    """Write the tokenizer in the layout of released Llama checkpoints, which other libraries read too."""
    directory = Path(directory)
    tokenizer.save_vocabulary(str(directory))
    special = {role: getattr(tokenizer, role) for role in _SPECIAL_ROLES if getattr(tokenizer, role)}
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings = {
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "added_tokens_decoder": {
            str(index): {field: getattr(token, field) for field in fields}
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": tokenizer.legacy,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "tokenizer_class": "LlamaTokenizer",
    }
    for name, content in ((TOKENIZER_CONFIG_FILE, settings), (SPECIAL_TOKENS_FILE, special)):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
