"""Llama's sentencepiece tokenizer, id for id as Vicuna and LLaVA-1.5 were trained with it.

transformers 5 converts `tokenizer.model` to another engine, which gives other ids around leading and double spaces;
this one calls sentencepiece itself. Source of the rules for spaces: transformers 4.37's `LlamaTokenizer`, `legacy`
included.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AddedToken, PreTrainedTokenizer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.files.home_directory import expand_home
from llava.files.json_files import write_settings
from llava.tokenization.sentencepiece_model import VOCABULARY_FILE, load_pieces, read_vocabulary
from llava.tokenization.text_limit import MAX_TEXT, describe_long_text
from llava.tokenization.tokenizer_files import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    LLAMA_CLASS,
    SPECIAL_ROLES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    added_tokens,
    check_settings,
    read_json,
    special_tokens,
    token_text,
    tokenizer_settings,
    write_engine,
)
from llava.tokenization.tokenizer_json import (
    SPACE,
    TOKENIZER_JSON_FILE,
    puts_space_after_special_tokens,
    sentencepiece_from_json,
)

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"


class LlavaTokenizer(PreTrainedTokenizer):
    """Llama tokenizer on sentencepiece: text to token ids and back.

    Args:
        vocab_file: path of `tokenizer.model`; not needed where `vocabulary` is given.
        legacy: True = a space is put before every stretch of text, also after a special token; False = before the
            first only. Vicuna-1.5 says False in its `tokenizer_config.json`; files that say nothing mean True.
        add_bos_token: begin every encoded text with `<s>`.
        add_eos_token: end every encoded text with `</s>`.
        vocabulary: the bytes of a `tokenizer.model`, taken instead of the file.
        kwargs: what `transformers.PreTrainedTokenizer` takes (special tokens, `model_max_length` in tokens, ...).

    Raises:
        ValueError: if neither file nor bytes are given, they hold no vocabulary, or it drops or merges spaces while
            normalising, which Llama's never does.
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
        name = str(vocab_file or "vocabulary")
        self.vocabulary_bytes = read_vocabulary(Path(vocab_file)) if vocabulary is None else vocabulary
        self._pieces = load_pieces(self.vocabulary_bytes, name)
        if self._pieces.decode(self._pieces.encode("  a  b ")) != "  a  b ":
            raise ValueError(f"{name}: this sentencepiece model changes spaces, so it is not a Llama tokenizer")
        for role, default in zip(SPECIAL_ROLES, ("<unk>", "<s>", "</s>", None), strict=True):
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
            UnicodeEncodeError: if the text holds half of a surrogate pair, which is not a character.
            ValueError: if the text is longer than `MAX_TEXT`.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"the text {describe_long_text(text)}; shorten it")
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
        """Put `<s>` before and `</s>` after each text, as configured."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        second = [] if token_ids_1 is None else start + token_ids_1 + end
        return start + token_ids_0 + end + second

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces to text; the space that encoding put before the first is taken off.

        Ids beyond the vocabulary that no token has (weights are padded to round numbers of rows) are empty text.
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

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write the files from which `AutoTokenizer` of transformers 4 and 5 gives the same ids, `<s>` in front.

        transformers 5 leaves out the space before a text that begins with one; nothing in the files can change that.

        Args:
            save_directory: made where it is missing.
            args, kwargs: accepted as in transformers; of them only `repo_id` is used.
            push_to_hub: upload them too, to `repo_id` or a repository of the directory's name.

        Returns:
            paths of the files.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self, directory)
        names = [VOCABULARY_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE]
        try:
            write_engine(self, directory, self.added_tokens_decoder, special_tokens(self), LLAMA_CLASS)
            names.append(TOKENIZER_JSON_FILE)
        except ValueError as error:
            (directory / TOKENIZER_JSON_FILE).unlink(missing_ok=True)
            logger.info("%s has no %s, since %s", directory, TOKENIZER_JSON_FILE, error)
        if isinstance(self.chat_template, str):
            (directory / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
            names.append(CHAT_TEMPLATE_FILE)
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id") or directory.name)
        return tuple(str(directory / name) for name in names)

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


def load_tokenizer(directory: str | Path, *, rows: int | None = None) -> LlavaTokenizer:
    """Load the tokenizer of a checkpoint directory, from `tokenizer.model`, else from `tokenizer.json`.

    `legacy` is what `tokenizer_config.json` says. Where it says nothing, `tokenizer.model` means True, as it did before
    the flag existed; without that file it is what `tokenizer.json` does with text after `</s>`.

    Args:
        directory: of the checkpoint.
        rows: of the model's embedding; added tokens beyond them are left out. None = all belong to the model.

    Raises:
        FileNotFoundError: if both are missing.
        ValueError: if one of its JSON files holds no object, or `tokenizer.json` no vocabulary like Llama's.
    """
    directory = Path(expand_home(directory))
    vocabulary, engine = directory / VOCABULARY_FILE, directory / TOKENIZER_JSON_FILE
    has_vocabulary = vocabulary.is_file()
    if not has_vocabulary and not engine.is_file():
        raise FileNotFoundError(
            f"{directory}: {VOCABULARY_FILE} is missing; copy it there from the base model's directory"
        )
    settings = read_json(directory / TOKENIZER_CONFIG_FILE)
    check_settings(settings, directory / TOKENIZER_CONFIG_FILE)
    special = {**read_json(directory / SPECIAL_TOKENS_FILE), **settings}
    roles = {role: special[role] for role in SPECIAL_ROLES if special.get(role)}
    legacy = settings["legacy"] if "legacy" in settings else has_vocabulary or puts_space_after_special_tokens(engine)
    return LlavaTokenizer(
        str(vocabulary) if has_vocabulary else None,
        vocabulary=None if has_vocabulary else sentencepiece_from_json(engine),
        legacy=legacy,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        model_max_length=settings.get("model_max_length") or int(1e30),
        padding_side=settings.get("padding_side") or "right",
        added_tokens_decoder=added_tokens(directory, settings, rows),
        clean_up_tokenization_spaces=False,
        **{role: token_text(token, directory / TOKENIZER_CONFIG_FILE) for role, token in roles.items()},
    )


def save_tokenizer(tokenizer: LlavaTokenizer, directory: str | Path) -> None:
    """Write the tokenizer in the layout of released Llama checkpoints, which other libraries read too."""
    directory = Path(directory)
    tokenizer.save_vocabulary(str(directory))
    special = special_tokens(tokenizer)
    settings = tokenizer_settings(tokenizer, tokenizer.added_tokens_decoder, special, LLAMA_CLASS)
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
        image_token_id: row of the embedding that `<image>` gets; the text after it starts like a new one.
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
    special = {**special_tokens(tokenizer), "pad_token": pad_token}
    write_engine(tokenizer, directory, added, special, "PreTrainedTokenizerFast", (DEFAULT_IMAGE_TOKEN,))
    tokenizer.save_vocabulary(str(directory))
    write_settings(special, directory / SPECIAL_TOKENS_FILE)
    outside = {token.content: index for index, token in added.items() if index >= tokenizer.vocab_size}
    write_settings(outside, directory / ADDED_TOKENS_FILE)
    (directory / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _take_row(tokenizer: LlavaTokenizer, added: dict[int, AddedToken], index: int, content: str) -> None:
    """Assign a row of the embedding to an added token.

    Raises:
        ValueError: if the id belongs to another token, or the token has another id.
    """
    holder = added[index].content if index in added else tokenizer.convert_ids_to_tokens(index)
    known = tokenizer.get_vocab().get(content, index)
    if holder not in ("", content) or known != index:
        other = f"id {index} is {holder!r}" if holder not in ("", content) else f"it has id {known}"
        raise ValueError(f"{content!r} can't have id {index}: {other}; give it the next free row")
    added[index] = AddedToken(content, normalized=False, special=True)
