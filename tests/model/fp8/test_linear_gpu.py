"""FP8 on a GPU that has it: products, compiled and captured batches, the chat's kernels, LoRA over FP8 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.chat.chat import answer_one
from llava.inference.sampling import Sampling
from llava.inference.session import Session
from llava.model.capabilities import capabilities_of
from llava.model.fp8.linear import Fp8Linear, find_product_problem, quantize_rows
from llava.model.packed.fused_lora import FusedLinear, LoraFactors, split_linear
from llava.model.packed.lora_linear import Fp8Weight

LLAVA_TINY = str(Path(__file__).resolve().parents[3] / "playground" / "llava-tiny")
HAS_FP8 = torch.cuda.is_available() and capabilities_of("cuda").has_fp8
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device with FP8")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_products_are_those_of_dequantised_factors(tokens, compiled):
    assert find_product_problem(torch.device("cuda")) is None
    torch.manual_seed(0)
    layer = Fp8Linear.of(*quantize_rows(torch.randn(512, 256, device="cuda")))
    inputs = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    rows, scales = quantize_rows(inputs)
    expected = (rows.float() * scales) @ (layer.values.float() * layer.scales).t()
    found = (torch.compile(layer) if compiled else layer)(inputs)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("mode", ["off", "on"])
def test_batch_and_chat_answer_as_in_16_bit(tmp_path, mode):
    sessions = [Session.load(LLAVA_TINY, bits=bits, device="cuda") for bits in (16, "fp8")]
    colors = ("red", "green", "blue", "yellow")
    for color in colors:
        Image.new("RGB", (96, 64), color).save(tmp_path / f"{color}.png")
    questions = [Question(number, "What color is it?", (f"{color}.png",)) for number, color in enumerate(colors)]
    sampling = Sampling(max_new_tokens=4)

    def ask(session):
        answers = answer_batch(session, questions, tmp_path, sampling, compile_mode=mode)
        return {answer.question: answer.text for answer in answers}

    plain, narrow = map(ask, sessions)
    assert sum(plain[question] == narrow[question] for question in questions) >= len(questions) - 1
    image = Image.new("RGB", (96, 64), "red")
    chat = [answer_one(session, "What color is it?", [image], sampling) for session in sessions]
    assert chat[0] == chat[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_over_fp8_weights_point_where_those_over_exact_ones_do(compiled):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    widths, weight = (256, 128), draw(384, 256)
    adapters = tuple(
        LoraFactors(draw(16, 256).requires_grad_(), draw(width, 16).requires_grad_(), 0.5, 0.0) for width in widths
    )
    inputs = draw(1, 512, 256).to(torch.bfloat16).requires_grad_()
    leaves = [inputs, *(factor for adapter in adapters for factor in (adapter.a, adapter.b))]
    compute = torch.compile(split_linear) if compiled else split_linear
    upstream = draw(1, 512, 384).to(torch.bfloat16)
    found, expected = (
        torch.autograd.grad(
            (torch.cat(compute(inputs, FusedLinear(each, widths, adapters), True), -1) * upstream).sum(), leaves
        )
        for each in (Fp8Weight.quantize(weight), weight.to(torch.bfloat16))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), 0) > 0.995
