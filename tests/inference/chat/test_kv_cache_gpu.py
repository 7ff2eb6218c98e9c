"""Decode steps on CUDA: with or without CUDA graphs, fused Triton kernels or the layers, the same logits."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from llava.inference.chat.chat import Chat
from llava.inference.chat.kv_cache import GrowingKVCache, KVCacheFactory, load_fused_step
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.inference.session import Sampling, Session
from llava.model.quantization import quantize_linears, quantized_parameter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 256, "intermediate_size": 1200, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "max_position_embeddings": 2048}
KINDS = [{}, {"num_key_value_heads": 2}, {"vocab_size": 67}]


@pytest.fixture
def build(tiny_model):
    """The function (dtype, **changes) -> model on the GPU."""

    def build(dtype, **changes):
        model = tiny_model(**{**SIZES, **changes})
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(1 + 0.1 * weight if weight.ndim == 1 else 0.2 * weight)
        return model.to("cuda", dtype)

    return build


def some_tokens(count):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.fixture
def replays(monkeypatch):
    """Every CUDA graph replay, appended as it happens."""
    happened, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: happened.append(graph) or replay(graph))
    return happened


@pytest.fixture
def logits_of(replays):
    """The function (cache, model, tokens, first) -> logits after `first` prefilled tokens and each decoded one, (S, W).

    It fails if a graphed cache hardly replays graphs (a refused capture is only logged), or another cache does.
    """

    def compute(cache, model, tokens, first):
        replays.clear()
        found = [cache.prefill(model.get_input_embeddings()(tokens[:first]).detach()).clone()]
        found += [cache.decode(token).clone() for token in tokens[first:].split(1)]
        replayed = len(replays) / (len(tokens) - first)
        assert replayed > 0.9 if cache._is_graphed else replayed == 0
        return torch.cat(found)

    return compute


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("first", [5, 600])
def test_kernels_compute_what_the_layers_do(build, logits_of, changes, first):
    tokens = some_tokens(first + 700)  # more than the first capacity
    model = build(torch.float32, **changes)
    llama = RaggedLlama(model)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0, first - 1 :]
    kernels = load_fused_step(llama)
    assert kernels is not None
    for fused in (None, kernels):
        for graphed in (False, True):
            found = logits_of(GrowingKVCache(llama, is_graphed=graphed, fused_step=fused), model, tokens, first)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_are_no_further_from_the_truth_than_layers(build, logits_of, dtype):
    tokens = some_tokens(900)
    model = build(dtype)
    llama = RaggedLlama(model)
    kernels = load_fused_step(llama)
    assert kernels is not None
    found = [logits_of(GrowingKVCache(llama, fused_step=fused), model, tokens, 600) for fused in (None, kernels)]
    with torch.no_grad():
        truth = model.float()(tokens[None]).logits[0, 599:]
    by_layers, by_kernels = ((logits.float() - truth).pow(2).mean().sqrt() for logits in found)
    assert by_kernels < 1.1 * by_layers < 0.1 * truth.std()


@pytest.mark.parametrize("with_kernels", [False, True])
def test_graphed_steps_give_the_bits_of_eager_ones(build, logits_of, with_kernels):
    tokens = some_tokens(700)
    model = build(torch.bfloat16)
    llama = RaggedLlama(model)
    fused = load_fused_step(llama) if with_kernels else None
    assert (fused is not None) is with_kernels
    plain, graphed = (
        logits_of(GrowingKVCache(llama, is_graphed=graphed, fused_step=fused), model, tokens, 5)
        for graphed in (False, True)
    )
    assert torch.equal(plain, graphed)


def quantise(model, bits):
    layers = model.get_model().layers
    weights = {name: module.weight.data for name, module in layers.named_modules() if type(module) is nn.Linear}
    quantize_linears(layers, bits, model.dtype)
    for name, weight in weights.items():
        module = layers.get_submodule(name)
        module.weight = quantized_parameter(module, weight, model.dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(build, logits_of, bits):
    """4-bit decode steps are captured as CUDA graphs, 8-bit ones are not."""
    pytest.importorskip("bitsandbytes")
    tokens = some_tokens(20)
    model = build(torch.bfloat16, intermediate_size=1216)
    quantise(model, bits)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0, 4:].float()
    cache = KVCacheFactory(model).create()
    assert cache._is_graphed is (bits == 4)
    found = logits_of(cache, model, tokens, 5).float()
    plain = logits_of(GrowingKVCache(RaggedLlama(model)), model, tokens, 5).float()
    torch.testing.assert_close(found, plain, rtol=0, atol=0.01 * float(plain.abs().max()))
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.99


@pytest.fixture(scope="module")
def sessions(goldens):
    """A session on the CPU and the same on the GPU, in fp32."""
    return [Session.load(str(goldens / "llava-v1.5-golden"), device=name, dtype="float32") for name in ("cpu", "cuda")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chat_is_the_same_as_on_the_cpu(sessions, temperature):
    sampling = Sampling(temperature=temperature, max_new_tokens=40, seed=5)
    on_cpu, on_gpu = (Chat(session, sampling) for session in sessions)
    assert on_gpu.is_pipelined
    assert not on_cpu.is_pipelined
    for turn, n_pieces in (("hello", 100), ("and now?", 3), ("why?", 100)):
        for chat in (on_cpu, on_gpu):
            with contextlib.closing(chat.reply(turn)) as pieces:
                for _ in range(n_pieces):
                    next(pieces, None)
        assert on_gpu.ids == on_cpu.ids
        assert on_gpu.turns == on_cpu.turns
        assert on_gpu.computed_positions == on_cpu.computed_positions


def test_a_missing_compiler_is_logged(build, monkeypatch, caplog):
    from llava.inference.chat import decode_step

    monkeypatch.setattr(decode_step, "matvec", _fail)
    assert load_fused_step(RaggedLlama(build(torch.float32))) is None
    assert caplog.messages[-1] == "Triton can't compile the decode kernels, so decoding is slower: no compiler"


def _fail(*args, **options):
    raise RuntimeError("no compiler")


def test_biases_have_no_kernels(build):
    assert load_fused_step(RaggedLlama(build(torch.float32, attention_bias=True))) is None


def test_interrupted_answers_leave_the_graph_usable(sessions):
    session = dataclasses.replace(sessions[1])
    whole, chat = (Chat(session, Sampling(max_new_tokens=30)) for _ in range(2))
    for n_pieces in (1, 2, 3, 30):
        with contextlib.closing(chat.reply("hello")) as pieces:
            for _ in range(n_pieces):
                next(pieces, None)
        chat.reset()
    assert "".join(chat.reply("hello")) == "".join(whole.reply("hello"))
