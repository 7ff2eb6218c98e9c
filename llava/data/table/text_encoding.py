"""Decode the text of a table, and name the encoding of one that is not UTF-8.

Encodings of one byte per letter decode everything, so the letters decide: Russian read as Windows-1252 is a row of
accented vowels. A candidate is scored by how frequent its letters are in the languages that are written in it, and by
whether words mix alphabets, or capitals with small letters, as no word does.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from llava.data.table.bad_rows import TableError
from llava.files.terminal_text import show

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_BYTES_SCORED = 1_000_000
_LEAST_SCORE = 0.75
_LEAST_LETTERS = 2
_WORDS_SHOWN = 3
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
_WORD = re.compile(r"[^\W\d_]+")
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфіїєґўјљњћђџѓќѕё"
_RUSSIAN_PERMILLE = {
    "о": 110,
    "е": 85,
    "а": 80,
    "и": 74,
    "н": 67,
    "т": 63,
    "с": 55,
    "р": 47,
    "в": 45,
    "л": 44,
    "к": 35,
    "м": 32,
    "д": 30,
    "п": 28,
    "у": 26,
    "я": 20,
    "ы": 19,
    "ь": 17,
    "г": 17,
    "з": 16,
    "б": 16,
    "ч": 14,
    "й": 12,
    "х": 10,
    "ж": 9,
    "ш": 7,
    "ю": 6,
    "ц": 5,
    "щ": 4,
    "э": 3,
    "ф": 3,
}
_RARE_PERMILLE = 1
_CAPITAL_LOSS = 0.6  # of a letter's log-probability: of two readings, one in small letters is likelier
_ALPHABETS = {  # encoding -> letters and signs beyond ASCII that its languages use
    "cp1251": _CYRILLIC,
    "koi8-r": _CYRILLIC,
    "koi8-u": _CYRILLIC,
    "cp866": _CYRILLIC,
    "cp1252": "éèàçñöüäßáíóúêâôîûãõåøæëïùœÿý",
    "cp1254": "şığçöüâîû",
    "cp1250": "ąćęłńśźżóáčďéěíňřšťúůýžőűöüäâăîşţđ",
    "shift_jis": "",
    "gb18030": "",
}
"""The first of equally plausible ones is named."""
_SIGNS = frozenset("’‘“”„–—…«»°№€¿¡\u00a0")
_COMMON_HAN = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种"
    "什么图片颜色几多少哪谁怎样吗没红蓝白黑绿黄车狗猫男女孩手头左右边看见请问答案动物天气食水果树花山"
)
_KANA = re.compile("[\u3041-\u30ff]")
_HAN = re.compile("[\u4e00-\u9fff]")


class Guess(NamedTuple):
    """A plausible encoding, and words of the text as it decodes them."""

    encoding: str
    words: str


def decode_table(content: bytes, name: str, encoding: str | None = None) -> tuple[str, list[str]]:
    """Return the text of a table without its byte order mark, and what must be said about its encoding.

    Args:
        content: of the file.
        name: of the file, for messages.
        encoding: as the user names it; None = UTF-8, or UTF-16 with a byte order mark.

    Raises:
        TableError: if it is in another encoding; the message names the likely one.
    """
    marked = next((marked for mark, marked in _BOMS if content.startswith(mark)), None)
    used = encoding or marked or "utf-8"
    try:
        text = content.decode(used)
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        if not used.lower().startswith("utf-16"):
            place += f" (line {content.count(10, 0, error.start) + 1})"
        raise TableError(f"{name}: not {_title(used)}: {place}; {_way_out(content, used)}") from error
    except UnicodeError as error:  # UTF-16 without a byte order mark where one must be
        raise TableError(f"{name}: not {_title(used)} ({error}); {_way_out(content, used)}") from error
    if (nul := text.find("\0")) >= 0:
        place = f"zero byte at offset {nul} (line {text.count(chr(10), 0, nul) + 1})"
        raise TableError(f"{name}: not {_title(used)} text: {place}; {_way_out(content, used)}")
    notes = ["the text is in UTF-16 by its byte order mark"] if encoding is None and used == "utf-16" else []
    return text.removeprefix("\ufeff"), notes


def guess_encoding(content: bytes) -> Guess | None:
    """Return the encoding in which a text that is not UTF-8 has plausible letters; None if none is sure."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content[:_BYTES_SCORED]:
        return _guess_utf16(content[:_BYTES_SCORED])
    first = _BEYOND_ASCII.search(content)
    if first is None or _is_damaged_utf8(content):
        return None
    start = content.rfind(b"\n", 0, first.start()) + 1
    sample = content[start : start + _BYTES_SCORED]
    scores = {encoding: _score(sample, encoding) for encoding in _ALPHABETS}
    best = max(scores, key=scores.__getitem__)
    if scores[best] < _LEAST_SCORE:
        return None
    return Guess(best, _show_words(_decode_part(sample, best) or ""))


def _title(encoding: str) -> str:
    return "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding


def _way_out(content: bytes, used: str) -> str:
    guess = guess_encoding(content)
    if guess is not None and codecs.lookup(guess.encoding).name != codecs.lookup(used).name:
        return f"it looks like {guess.encoding} ({guess.words}): pass --encoding {guess.encoding}"
    if _is_damaged_utf8(content):
        return "the rest is UTF-8: correct this text in the table, and save it as 'CSV UTF-8'"
    return "save the table as 'CSV UTF-8', or pass --encoding if you know its encoding, for example: --encoding cp1252"


def _is_damaged_utf8(content: bytes) -> bool:
    """Return whether most characters beyond ASCII are valid UTF-8, which no other text is by chance."""
    text = content.decode("utf-8", errors="replace")
    beyond = sum(map(len, re.findall(r"[^\x00-\x7f]+", text)))
    return beyond > 0 and text.count("\ufffd") * 4 < beyond


def _guess_utf16(sample: bytes) -> Guess | None:
    """UTF-16 without its byte order mark: the zero bytes of ASCII characters are all on one side."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Guess("utf-16", _show_words(sample[: len(sample) // 2 * 2].decode("utf-16", errors="replace")))
    sides = Counter(match.start() % 2 for match in re.finditer(b"\0", sample))
    if len(sides) != 1:
        return None
    encoding = "utf-16-le" if 1 in sides else "utf-16-be"
    text = sample[: len(sample) // 2 * 2].decode(encoding, errors="replace")
    words = _WORD.findall(text)
    return Guess(encoding, _show_words(text)) if words and "\ufffd" not in text else None


def _decode_part(sample: bytes, encoding: str) -> str | None:
    """Return the decoded sample, whose last character may be cut off; None if it is not in this encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        return decoder.decode(sample, final=len(sample) < _BYTES_SCORED)
    except UnicodeDecodeError:
        return None


def _score(sample: bytes, encoding: str) -> float:
    """Return how plausible the characters beyond ASCII are, 0 to 1."""
    text = _decode_part(sample, encoding)
    if text is None:
        return 0.0
    beyond = Counter(character for character in text if character > "\x7f")
    signs = sum(count for character, count in beyond.items() if character in _SIGNS)
    letters = sum(beyond.values()) - signs
    if encoding in ("shift_jis", "gb18030"):
        return _score_east_asian(text, letters, encoding)
    alphabet = frozenset(_ALPHABETS[encoding] + _ALPHABETS[encoding].upper())
    if letters == 0:  # quotation marks and dashes alone: the same in all of Windows' encodings
        return 0.8 if encoding == "cp1252" else 0.0
    known = sum(count for character, count in beyond.items() if character in alphabet)
    score = known / letters * _share_of_sound_words(text, alphabet)
    if _ALPHABETS[encoding] is _CYRILLIC:
        score *= _rate_letters({character: count for character, count in beyond.items() if character in alphabet})
    return score


def _rate_letters(counts: Mapping[str, int]) -> float:
    """Return how frequent letters are in Russian: about 1 for Russian, 0.8 for its letters confused with each other."""
    total = sum(
        count
        * (math.log(_RUSSIAN_PERMILLE.get(letter.lower(), _RARE_PERMILLE) / 1000) - _CAPITAL_LOSS * letter.isupper())
        for letter, count in counts.items()
    )
    return max(0.0, (total / max(1, sum(counts.values())) + 7) / 4)


def _share_of_sound_words(text: str, alphabet: frozenset[str]) -> float:
    """Return the share of words with a letter beyond ASCII that are written as words are: one alphabet, capitals first.

    Latin letters beyond ASCII stand among ASCII letters, Cyrillic ones never do.
    """
    mixes_ascii = any("\xc0" <= letter <= "\u024f" for letter in alphabet)
    words = [word for word in _WORD.findall(text) if not word.isascii()]
    sound = 0
    for word in words:
        is_cased = word.islower() or word.isupper() or word[1:].islower()
        n_ascii = sum(letter.isascii() for letter in word)
        is_one_script = n_ascii * 3 >= len(word) or len(word) == 1 if mixes_ascii else n_ascii == 0
        sound += is_cased and is_one_script
    return sound / len(words) if words else 0.0


def _score_east_asian(text: str, letters: int, encoding: str) -> float:
    if letters < _LEAST_LETTERS:
        return 0.0
    if encoding == "shift_jis":
        kana = len(_KANA.findall(text))
        return min(1.0, 0.5 + kana / letters) if kana * 4 >= letters else 0.0
    han = _HAN.findall(text)
    common = sum(character in _COMMON_HAN for character in han)
    return min(1.0, 0.5 + common / letters) if common * 5 >= letters else 0.0


def _show_words(text: str) -> str:
    words = [word for word in _WORD.findall(text) if not word.isascii()] or _WORD.findall(text)
    return show(" ".join(words[:_WORDS_SHOWN]))
