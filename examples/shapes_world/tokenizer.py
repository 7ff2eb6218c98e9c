"""The tiny model's own sentencepiece tokenizer: Llama's settings on a small vocabulary.

Like Llama's it is a BPE model with byte fallback, so that any text encodes, and it leaves text as it is: no Unicode
normalisation, spaces kept. The words of the templates and of the little world are single pieces.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import sentencepiece
from questions import FORMS
from scenes import sample_scene

VOCABULARY = 704  # pieces, 256 of them bytes
_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ENGLISH = (
    "the of and to in is it you that was for on are with as his they be at one have this from or had by but not what "
    "all were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my than "
    "first water been call who its now find long down day did get come made may part over new sound take only little "
    "work know place year live me back give most very after thing our just name good sentence man think say great "
    "where help through much before line right too mean old any same tell boy follow came want show also around form "
    "three small set put end does another well large must big even such because turn here why ask went men read "
    "need land different home us move try kind hand picture again change off play spell air away animal house point "
    "page letter mother answer found study still learn should world car tree dog cat bus train street table food "
    "person woman wearing holding sitting standing playing color white black brown pink gray yellow image photo "
    "background"
)


def train_tokenizer(seed: int = 0, scenes: int = 1500) -> bytes:
    """Train the tokenizer on the templates, the world's questions and some English.

    Args:
        seed: of the scenes whose questions are read.
        scenes: how many of them.

    Returns:
        the content of `tokenizer.model`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(random.Random(seed), scenes),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _lines(rng: random.Random, scenes: int) -> Iterator[str]:
    """Text in which every word of the world and of the templates is frequent."""
    for _ in range(scenes):
        scene = sample_scene(rng)
        for forms in FORMS.values():
            for form in forms:
                candidates = form(scene, rng)
                if not candidates:
                    continue
                text, answer = rng.choice(candidates)
                first, rest = text.split(" ", 1)
                yield f"\t{first}"  # a question starts right after a line break, without the space before it
                yield rest
                yield answer
        yield f"{_SYSTEM_PROMPT} USER: ASSISTANT:"
        yield "left of right of above below bigger than smaller than more than fewer than as many as the same as"
    for _ in range(30):
        yield _ENGLISH
        yield _ENGLISH.title()
        yield "0 1 2 3 4 5 6 7 8 9 yes no Yes No , . ; : ! ? ' \" ( ) [ ] - + = / % & # @ * $ < > _ { } ~ ^ \\ |"
        yield "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
