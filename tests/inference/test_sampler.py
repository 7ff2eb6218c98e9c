"""Tokens are drawn as their probabilities say, each by a key of its own, and nearly equal logits draw the same."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

from llava.inference.sampler import (
    ROWS_AT_ONCE,
    Sampling,
    SeededDraws,
    draw_key,
    exponential_noise,
    score_tokens,
    select_tokens,
)

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
N_DRAWS = 40_000
KEYS = [draw_key(0, number, 0) for number in range(N_DRAWS)]
WIDE = 4 * (0.25 / N_DRAWS) ** 0.5  # four standard deviations of a share, at most; the keys never change


def shares(logits, sampling):
    tokens = select_tokens(logits.expand(N_DRAWS, -1), sampling, KEYS)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / N_DRAWS


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]], dtype=torch.bfloat16)
    assert select_tokens(logits, Sampling(), None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_probabilities(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(LOGITS, Sampling(temperature=temperature)), expected, rtol=0, atol=WIDE)


@pytest.mark.parametrize(
    "top_p, kept", [(1.0, [0, 1, 2, 3, 4]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (0.1, [1]), (0.55, [1])]
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p, kept):
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] > 0.55
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(shares(LOGITS, Sampling(temperature=1, top_p=top_p)), expected, rtol=0, atol=WIDE)


def test_top_p_is_that_of_transformers():
    for top_p in (0.3, 0.6, 0.9, 0.99):
        logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 2
        kept = TopPLogitsWarper(top_p)(None, logits).isfinite()
        for row, allowed in zip(logits, kept, strict=True):
            tokens = select_tokens(row.expand(4000, -1), Sampling(temperature=1, top_p=top_p), KEYS[:4000])
            assert set(tokens.tolist()) <= set(allowed.nonzero().flatten().tolist())


def test_certainty():
    logits = torch.tensor([[0.0, 50.0, -50.0]] * 100)
    assert set(select_tokens(logits, Sampling(temperature=1), KEYS[:100]).tolist()) == {1}


def test_noise_is_exponential_and_independent():
    times = exponential_noise(torch.tensor(KEYS[:500]), 400).double()  # (M, W)
    assert times.min() > 0
    assert times.mean().item() == pytest.approx(1, abs=0.01)
    assert times.var().item() == pytest.approx(1, abs=0.03)
    for share in (0.1, 0.5, 0.9, 0.999):
        reached = -torch.log1p(torch.tensor(-share, dtype=torch.float64))
        assert (times < reached).double().mean().item() == pytest.approx(share, abs=0.005)
    for one, other in ((times[:-1], times[1:]), (times[:, :-1], times[:, 1:])):  # neighbours of a row, of a column
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.01
    assert len(set(times.flatten().tolist())) > 0.99 * times.numel()


def reference_times(key, vocabulary):
    """splitmix64 in Python's own numbers."""
    mask, times = 2**64 - 1, []
    for token in range(1, vocabulary + 1):
        value = (key + token * 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
        times.append(((value >> 11) + 1) * 2.0**-53)
    return -torch.log1p(-torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), KEYS[0]])
def test_the_mixing_is_splitmix64(key):
    found = exponential_noise(torch.tensor([key]), 50)[0].double()
    torch.testing.assert_close(found, reference_times(key, 50), rtol=1e-3, atol=0)


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_last_bits_of_logits_change_no_draw(top_p, scale):
    """Batches of other sizes and other numbers of threads give logits that differ by so much."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(800, 2000, generator=generator)
    near = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    assert not torch.equal(near, logits)
    sampling = Sampling(temperature=1, top_p=top_p)
    assert torch.equal(select_tokens(near, sampling, KEYS[:800]), select_tokens(logits, sampling, KEYS[:800]))


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it():
    count = ROWS_AT_ONCE + 40
    logits = torch.randn(count, 300, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=1.3, top_p=0.95)
    together = select_tokens(logits, sampling, KEYS[:count])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    moved = select_tokens(logits[order], sampling, [KEYS[row] for row in order])
    assert torch.equal(moved, together[order])
    for row in range(0, count, 17):
        assert select_tokens(logits[row : row + 1], sampling, KEYS[row : row + 1])[0] == together[row]


def test_generate_draws_the_same():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=5)
    processors = LogitsProcessorList([SeededDraws(sampling, ["a", "b", "c"])])
    for step in range(4):
        keys = [draw_key(5, name, step) for name in "abc"]
        found = processors(torch.zeros(3, 1, dtype=torch.long), logits).argmax(-1)
        assert torch.equal(found, select_tokens(logits, sampling, keys))


def test_keys_are_repeatable_and_their_own():
    cases = list(itertools.product((0, 1), ([7], ["7"], ["7", 1]), range(200)))
    keys = [draw_key(seed, request_id, step) for seed, request_id, step in cases]
    assert keys == [draw_key(seed, request_id, step) for seed, request_id, step in cases]
    assert len(set(keys)) == 1200
    assert all(-(2**63) <= key < 2**63 for key in keys)


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
