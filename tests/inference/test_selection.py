"""Tokens are chosen as their probabilities say, each answer by numbers of its own."""

import itertools

import pytest
import torch

from llava.inference.selection import chance, score_tokens, select_tokens
from llava.inference.session import Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
GRID = [(number + 0.5) / 1000 for number in range(1000)]


def shares(sampling):
    tokens = select_tokens(LOGITS.expand(len(GRID), -1), sampling, GRID)
    return torch.bincount(tokens, minlength=5) / len(GRID)


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]], dtype=torch.bfloat16)
    assert select_tokens(logits, Sampling(), None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_probabilities(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(Sampling(temperature=temperature)), expected, rtol=0, atol=0.0011)


@pytest.mark.parametrize(
    "top_p, kept", [(1.0, [0, 1, 2, 3, 4]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (0.1, [1]), (0.55, [1])]
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p, kept):
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] > 0.55
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(shares(Sampling(temperature=1, top_p=top_p)), expected, rtol=0, atol=0.0011)


def test_top_p_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    for top_p in (0.3, 0.6, 0.9, 0.99):
        logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 2
        kept = TopPLogitsWarper(top_p)(None, logits).isfinite()
        chances = torch.linspace(0, 0.999, 400).tolist()
        for row, allowed in zip(logits, kept, strict=True):
            tokens = select_tokens(row.expand(400, -1), Sampling(temperature=1, top_p=top_p), chances)
            assert set(tokens.tolist()) <= set(allowed.nonzero().flatten().tolist())


def test_shares_of_the_unit_interval_begin_with_their_first_number():
    """Two tokens of probability 1/2, which is exact: each has a half, and the half without its end reaches 1/2."""
    logits = torch.zeros(4, 2)
    assert select_tokens(logits, Sampling(temperature=1), [0.0, 0.5 - 2**-52, 0.5, 1 - 2**-52]).tolist() == [0, 0, 1, 1]
    for top_p, last in ((0.5, 0), (0.5 + 2**-20, 1)):
        chosen = select_tokens(logits[:1], Sampling(temperature=1, top_p=top_p), [0.75])
        assert chosen.tolist() == [last]


def test_certainty_and_the_last_number_below_one():
    logits = torch.tensor([[0.0, 50.0, -50.0]] * 2)
    assert select_tokens(logits, Sampling(temperature=1), [0.0, 1 - 2**-52]).tolist() == [1, 1]


def test_chance_is_repeatable_even_and_its_own():
    values = [chance(seed, key, step) for seed, key, step in itertools.product((0, 1), (7, "7", "b"), range(200))]
    assert values == [
        chance(seed, key, step) for seed, key, step in itertools.product((0, 1), (7, "7", "b"), range(200))
    ]
    assert len(set(values)) == 1200
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 1200 - 0.5) < 0.03


def test_scores():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logprobs = logits.log_softmax(-1)
    tokens = torch.tensor([int(logits[0].argmax()), int(logits[1].argmin()), 2])
    chosen, runner_up, best = score_tokens(logits, tokens)
    for row in range(3):
        others = {token: logprobs[row, token].item() for token in range(6) if token != tokens[row]}
        assert runner_up[row] == max(others, key=others.get)
        assert best[row].item() == max(others.values())
        assert chosen[row] == logprobs[row, tokens[row]]
