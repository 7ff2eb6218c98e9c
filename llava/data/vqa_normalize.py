"""VQAv2 answer normalisation: which short answers count as the same.

Source: the VQA evaluation's public description (visualqa.org/evaluation.html) and the behaviour of its program, whose
quirks are kept because published accuracies contain them; each is marked below.
"""

from __future__ import annotations

import re
from functools import lru_cache

YES_NO, NUMBER, OTHER = "yes/no", "number", "other"
ANSWER_TYPES = (YES_NO, NUMBER, OTHER)
"""VQAv2's, in the order in which they are shown."""

ARTICLES = frozenset({"a", "an", "the"})

NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Written without an apostrophe, each of these words gets it back. A word with several apostrophes is recognised when
# exactly one of them is missing.
_WORDS_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a list of 84 quoted words reads worse)

CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _WORDS_WITH_APOSTROPHE for at, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}  # quirk: this one loses its apostrophe

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER = re.compile(r"\d+|\d*\.\d+")  # \d*\.?\d+ would try n * n ways to split n digits
_MOST_PERIODS = 32  # quirk: no more than this many periods are removed


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """Bring an answer into the form in which VQAv2 compares answers.

    Line breaks become spaces; punctuation is removed or becomes a space; letters become lower case; number words up to
    ten become digits; articles go; contractions get their apostrophe. Apostrophes and colons stay.

    Args:
        text: an answer as a person or a model wrote it.

    Returns:
        The normalised answer; it can be empty ("the").

    Example:
        >>> normalize_answer("The two dogs, dont they?")
        "2 dogs don't they"
    """
    return _normalize_words(_normalize_punctuation(strip_answer(text)))


def normalize_challenge_answer(text: str) -> str:
    """Bring an answer into the form that the challenges of VQAv2, TextVQA and VizWiz on EvalAI compare.

    Example:
        >>> normalize_challenge_answer("The dog's ball, 1,000?")
        "dog 's ball 1000"
    """
    return normalize_answer(tokenize_challenge_answer(text))


def tokenize_challenge_answer(text: str) -> str:
    """Return an answer in lower case, without commas and question marks, 's apart: the challenges do this first."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def strip_answer(text: str) -> str:
    """Make an answer one line without spaces around it, the only cleaning before a verbatim comparison."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def type_of_normalized(answer: str) -> str:
    """Return the type of a normalised true answer: "yes" and "no"; digits, also with a decimal point; the rest."""
    if answer in ("yes", "no"):
        return YES_NO
    return NUMBER if _NUMBER.fullmatch(answer) else OTHER


def _normalize_punctuation(text: str) -> str:
    # Quirks: a mark beside a space anywhere in the text is removed everywhere, otherwise each becomes a space; a number
    # with a comma ("1,000") makes every mark of the text go without a space; both are judged on the text as it came.
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_removed = has_comma_in_number or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if is_removed else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _normalize_words(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
