"""Sampling parameters of chat, batch inference and `eval_model`; `llava.inference.sampler` draws by them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Unlike in transformers, there is no default `top_k`.

    Attributes:
        temperature: 0 = the most likely token (greedy); above 0, tokens are sampled, more evenly the higher it is.
        top_p: sample among the most likely tokens that together have this probability; None = among all.
        num_beams: above 1, beam search.
        max_new_tokens: longest answer, in tokens; the context may leave less.
        seed: of the draws; None = a random one.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; choose 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; choose a probability above 0, at most 1")
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; choose 1 (no beam search) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; choose 1 or more")

    def generation_arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`; without beams `SeededDraws` samples instead of it."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature == 0 or self.num_beams == 1:
            return {**arguments, "do_sample": False}
        top_p = 1.0 if self.top_p is None else self.top_p
        return {**arguments, "do_sample": True, "temperature": self.temperature, "top_p": top_p, "top_k": 0}

    def seeded(self) -> Sampling:
        """Return these parameters with a seed, a random one if there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))
