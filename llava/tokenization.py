"""Llama's sentencepiece tokenizer, id for id as Vicuna and LLaVA-1.5 were trained with it.

transformers 5 converts `tokenizer.model` to another engine, which gives other ids around leading and double spaces;
this one calls sentencepiece itself. Source of the rules for spaces: transformers 4.37's `LlamaTokenizer`, `legacy`
included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, PreTrainedTokenizer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.files import read_settings, write_settings
from llava.tokenizer_json import (
    SPACE,
    TOKENIZER_JSON_FILE,
    added_tokens_of_json,
    puts_space_behind_special_tokens,
    sentencepiece_from_json,
    tokenizer_json,
)

VOCABULARY_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PAD_TOKEN = "<pad>"
_TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_SPECIAL_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")


class LlavaTokenizer(PreTrainedTokenizer):
    """Text to token ids and back.

    Args:
        vocab_file: path of `tokenizer.model`; not needed where `vocabulary` is given.
        legacy: True = a space is put before every stretch of text, also behind a special token; False = before the
            first only. Vicuna-1.5 says False in its `tokenizer_config.json`; files that say nothing mean True.
        add_bos_token: begin every encoded text with `<s>`.
        add_eos_token: end every encoded text with `</s>`.
        vocabulary: the bytes of a `tokenizer.model`, taken instead of the file.
        kwargs: what `transformers.PreTrainedTokenizer` takes (special tokens, `model_max_length` in tokens, ...).

    Raises:
        ValueError: if neither file nor bytes are given, or the vocabulary drops or merges spaces while normalising,
            which Llama's never does.
    """

    vocab_files_names: ClassVar = {"vocab_file": VOCABULARY_FILE}

    def __init__(
        self,
        vocab_file: str | None = None,
        *,
        legacy: bool = True,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        vocabulary: bytes | None = None,
        **kwargs: Any,
    ) -> None:
        if vocabulary is None and vocab_file is None:
            raise ValueError(f"no vocabulary; pass vocab_file=, the path of {VOCABULARY_FILE}, or its bytes")
        self.vocab_file = None if vocab_file is None else str(vocab_file)
        self.legacy = legacy
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.vocabulary_bytes = Path(vocab_file).read_bytes() if vocabulary is None else vocabulary
        self._pieces = load_pieces(self.vocabulary_bytes)
        if self._pieces.decode(self._pieces.encode("  a  b ")) != "  a  b ":
            name = vocab_file or "vocabulary"
            raise ValueError(f"{name}: this sentencepiece model changes spaces, so it is not a Llama tokenizer")
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
        """Join pieces to text; the space that encoding put before the first is taken off.

        Ids behind the vocabulary that no token has (weights are padded to round numbers of rows) are empty text.
        """
        text, run = "", []
        marks = {*self.all_special_tokens, *self.added_tokens_encoder}
        for token in tokens:
            if token in marks:
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
        return self._pieces.id_to_piece(index) if index < self.vocab_size else ""


def load_pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return a sentencepiece processor that adds no space of its own, from the bytes of `tokenizer.model`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def load_tokenizer(directory: str | Path, *, rows: int | None = None) -> LlavaTokenizer:
    """Load the tokenizer of a checkpoint directory, from `tokenizer.model`, else from `tokenizer.json`.

    `legacy` is what `tokenizer_config.json` says. Where it says nothing, `tokenizer.model` means True, as it did before
    the flag existed; without that file it is what `tokenizer.json` does with text behind `</s>`.

    Args:
        directory: of the checkpoint.
        rows: of the model's embedding; added tokens behind them are left out. None = all belong to the model.

    Raises:
        FileNotFoundError: if both are missing.
        ValueError: if one of its JSON files holds no object, or `tokenizer.json` no vocabulary like Llama's.
    """
    directory = Path(directory)
    vocabulary, engine = directory / VOCABULARY_FILE, directory / TOKENIZER_JSON_FILE
    has_vocabulary = vocabulary.is_file()
    if not has_vocabulary and not engine.is_file():
        raise FileNotFoundError(
            f"{directory}: {VOCABULARY_FILE} is missing; copy it there from the base model's directory"
        )
    settings = _read_json(directory / TOKENIZER_CONFIG_FILE)
    special = {**_read_json(directory / SPECIAL_TOKENS_FILE), **settings}
    legacy = settings["legacy"] if "legacy" in settings else has_vocabulary or puts_space_behind_special_tokens(engine)
    return LlavaTokenizer(
        str(vocabulary) if has_vocabulary else None,
        vocabulary=None if has_vocabulary else sentencepiece_from_json(engine),
        legacy=legacy,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        model_max_length=settings.get("model_max_length") or int(1e30),
        padding_side=settings.get("padding_side") or "right",
        added_tokens_decoder=_added_tokens(directory, settings, rows),
        clean_up_tokenization_spaces=False,
        **{role: _content(special[role]) for role in _SPECIAL_ROLES if special.get(role)},
    )


def save_tokenizer(tokenizer: LlavaTokenizer, directory: str | Path) -> None:
    """Write the tokenizer in the layout of released Llama checkpoints, which other libraries read too."""
    directory = Path(directory)
    tokenizer.save_vocabulary(str(directory))
    special = _special_tokens(tokenizer)
    settings = _settings(tokenizer, tokenizer.added_tokens_decoder, special, "LlamaTokenizer")
    write_settings(settings, directory / TOKENIZER_CONFIG_FILE)
    write_settings(special, directory / SPECIAL_TOKENS_FILE)


def write_hf_tokenizer(
    tokenizer: LlavaTokenizer,
    directory: str | Path,
    *,
    image_token_id: int,
    pad_token_id: int,
    chat_template: str,
) -> None:
    """Write the tokenizer for transformers' `AutoTokenizer`, `AutoProcessor` and what is built on them.

    `tokenizer.json` is loaded there as it is and gives the ids of our own prompts, `image_token_id` in the place of
    each image. `tokenizer.model` is for converters that read sentencepiece; `load_tokenizer` reads the directory too.

    Args:
        tokenizer: of the model.
        directory: an existing one.
        image_token_id: row of the embedding that `<image>` gets; a text begins anew behind it.
        pad_token_id: row of the token that pads batches: one that exists, or a free one, which becomes `<pad>`. In
            the latter case that word in a question is this token, not text.
        chat_template: Jinja text, without a begin token.

    Raises:
        ValueError: if an id belongs to another token, or no `tokenizer.json` can say what the vocabulary does.
    """
    directory = Path(directory)
    added = dict(tokenizer.added_tokens_decoder)
    _take_row(tokenizer, added, image_token_id, DEFAULT_IMAGE_TOKEN)
    pad_token = tokenizer.convert_ids_to_tokens(pad_token_id) or PAD_TOKEN
    if pad_token_id >= tokenizer.vocab_size:
        _take_row(tokenizer, added, pad_token_id, pad_token)
    special = {**_special_tokens(tokenizer), "pad_token": pad_token}
    engine = tokenizer_json(
        tokenizer.vocabulary_bytes,
        added,
        legacy=tokenizer.legacy,
        begin=(tokenizer.bos_token, tokenizer.bos_token_id) if tokenizer.add_bos_token else None,
        end=(tokenizer.eos_token, tokenizer.eos_token_id) if tokenizer.add_eos_token else None,
        text_starts_behind=(DEFAULT_IMAGE_TOKEN,),
    )
    # transformers changes each token's flags to what stands in tokenizer_config.json, so both files say the same
    flags = {token["id"]: AddedToken(**{key: token[key] for key in _TOKEN_FIELDS}) for token in engine["added_tokens"]}
    tokenizer.save_vocabulary(str(directory))
    write_settings(engine, directory / TOKENIZER_JSON_FILE)
    write_settings(_settings(tokenizer, flags, special, "PreTrainedTokenizerFast"), directory / TOKENIZER_CONFIG_FILE)
    write_settings(special, directory / SPECIAL_TOKENS_FILE)
    outside = {token.content: index for index, token in added.items() if index >= tokenizer.vocab_size}
    write_settings(outside, directory / ADDED_TOKENS_FILE)
    (directory / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _take_row(tokenizer: LlavaTokenizer, added: dict[int, AddedToken], index: int, content: str) -> None:
    """Give an added token its id.

    Raises:
        ValueError: if the id belongs to another token, or the token has another id.
    """
    holder = added[index].content if index in added else tokenizer.convert_ids_to_tokens(index)
    known = tokenizer.get_vocab().get(content, index)
    if holder not in ("", content) or known != index:
        other = f"id {index} is {holder!r}" if holder not in ("", content) else f"it has id {known}"
        raise ValueError(f"{content!r} can't have id {index}: {other}; give it the next free row")
    added[index] = AddedToken(content, normalized=False, special=True)


def _special_tokens(tokenizer: LlavaTokenizer) -> dict[str, str]:
    return {role: getattr(tokenizer, role) for role in _SPECIAL_ROLES if getattr(tokenizer, role)}


def _settings(
    tokenizer: LlavaTokenizer, added: Mapping[int, AddedToken], special: Mapping[str, str], class_name: str
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    return {
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "added_tokens_decoder": {
            str(index): {field: getattr(token, field) for field in _TOKEN_FIELDS}
            for index, token in sorted(added.items())
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": tokenizer.legacy,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "tokenizer_class": class_name,
    }


def _added_tokens(directory: Path, settings: Mapping[str, Any], rows: int | None) -> dict[int, AddedToken]:
    """Collect added tokens from the files that have listed them in one release or another, the newest first."""
    listed = settings.get("added_tokens_decoder") or {}
    # Whether a token is found before or after normalising makes no difference here: nothing is normalised.
    added = {int(index): AddedToken(**{**token, "normalized": False}) for index, token in listed.items()}
    engine = directory / TOKENIZER_JSON_FILE
    for index, token in (added_tokens_of_json(engine) if engine.is_file() else {}).items():
        added.setdefault(index, token)
    for content, index in _read_json(directory / ADDED_TOKENS_FILE).items():
        added.setdefault(index, AddedToken(content, special=True))
    return {index: token for index, token in added.items() if rows is None or index < rows}


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without its nulls, which say nothing; a missing file says nothing either."""
    return {key: value for key, value in (read_settings(path) if path.is_file() else {}).items() if value is not None}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
