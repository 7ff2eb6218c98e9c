"""FP8 linear layers: the laws of quantisation, products of dequantised factors, models loaded so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from llava.eval.model_vqa_loader import main
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.sampling import Sampling
from llava.inference.session import Session
from llava.model import quantization
from llava.model.builder import load_pretrained_model
from llava.model.capabilities import Machine, choose
from llava.model.fp8 import linear
from llava.model.fp8.linear import FP8_DTYPE, Fp8Linear, find_size_problem, quantize_rows

LLAVA_TINY = str(Path(__file__).resolve().parents[3] / "playground" / "llava-tiny")
HALF_STEP = 2**-4  # of a number in e4m3, which has three bits after the leading one


@given(seed=st.integers(0, 2**31), size=st.floats(1e-20, 1e20), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_come_back_within_half_a_step(seed, size, dtype):
    values = (torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    quantized, scales = quantize_rows(values)
    assert (quantized.dtype, scales.dtype, scales.shape) == (FP8_DTYPE, torch.float32, (5, 1))
    restored, precise = quantized.float() * scales, values.float()
    smallest = scales * 2**-10  # half of the smallest number
    assert torch.all((restored - precise).abs() <= HALF_STEP * precise.abs() * (1 + 1e-6) + smallest)
    assert torch.all(quantized.float().abs().amax(1)[precise.abs().amax(1) > 1e-9] == 448)


def test_rows_of_zeros_stay_zeros():
    quantized, scales = quantize_rows(torch.zeros(2, 16))
    assert torch.all(quantized.float() == 0)
    assert torch.all(scales > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantised_factors(dtype):
    torch.manual_seed(0)
    layer, weight = Fp8Linear(64, 48), torch.randn(48, 64)
    layer.weight = layer.quantize(weight)
    inputs = torch.randn(2, 3, 64).to(dtype)
    rows, scales = quantize_rows(inputs.flatten(0, 1))
    expected = (rows.float() * scales) @ (layer.values.float() * layer.scales).t()
    found = layer(inputs)
    assert (found.shape, found.dtype) == ((2, 3, 48), dtype)
    torch.testing.assert_close(found.flatten(0, 1).float(), expected, rtol=2**-8, atol=1e-5)
    exact = inputs.float() @ weight.t()
    assert 0 < float((found.float() - exact).norm() / exact.norm()) < 0.05


def test_a_token_does_not_depend_on_the_others():
    torch.manual_seed(0)
    layer = Fp8Linear(32, 32)
    layer.weight = layer.quantize(torch.randn(32, 32))
    inputs = torch.randn(7, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(inputs), torch.cat([layer(row[None]) for row in inputs]))


def test_sizes_that_the_product_does_not_support_are_named():
    layers = nn.ModuleDict({"good": Fp8Linear(32, 16), "bad": Fp8Linear(32, 24)})
    assert find_size_problem(layers) == "layer bad turns 32 features into 24, but FP8 needs multiples of 16"


@pytest.fixture(scope="module")
def sessions():
    return {bits: Session.load(LLAVA_TINY, bits=bits, device="cpu") for bits in (16, "fp8")}


def test_the_layers_of_the_llm_alone_are_in_fp8(sessions):
    plain, narrow = sessions[16].model, sessions["fp8"].model
    for (name, found), (_, expected) in zip(narrow.named_parameters(), plain.named_parameters(), strict=True):
        if ".layers." in name and "proj" in name and "vision_tower" not in name:
            assert found.dtype == torch.uint8, name
        else:
            assert torch.equal(found, expected), name


def test_batch_answers_are_those_of_single_questions(sessions, tmp_path):
    session = sessions["fp8"]
    colors = ("red", "green", "blue")
    for color in colors:
        Image.new("RGB", (96, 64), color).save(tmp_path / f"{color}.png")
    texts = ("What color is it?", "Is it red?", "How many circles are there?")
    questions = [
        Question(number, text, (f"{color}.png",))
        for number, (color, text) in enumerate((color, text) for color in colors for text in texts)
    ]
    sampling = Sampling(max_new_tokens=6)

    def ask(session, questions):
        return {answer.question: answer.text for answer in answer_batch(session, questions, tmp_path, sampling)}

    together = ask(session, questions)
    alone = {question: text for each in questions for question, text in ask(session, [each]).items()}
    assert together == alone
    plain = ask(sessions[16], questions)
    assert sum(plain[question] == together[question] for question in questions) >= len(questions) - 2


def test_the_flag_of_batch_inference_is_part_of_the_run(tmp_path, capsys):
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    question = {"question_id": 1, "image": "red.png", "text": "What color is it?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    words = ["--model-path", LLAVA_TINY, "--image-folder", str(tmp_path), "--device", "cpu", "--max_new_tokens", "3"]
    words += ["--question-file", str(tmp_path / "questions.jsonl"), "--answers-file", str(tmp_path / "answers.jsonl")]
    assert main([*words, "--fp8"]) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["text"] == "red"
    assert json.loads((tmp_path / "answers.jsonl.run.json").read_text())["bits"] == "fp8"
    assert main(words) == 2
    assert "belongs to another run (bits was 'fp8'" in capsys.readouterr().err


def test_a_device_without_fp8_is_refused(monkeypatch):
    ampere = choose(Machine("cuda", "A100", (8, 0)))
    monkeypatch.setattr(quantization, "capabilities_of", lambda device: ampere)
    with pytest.raises(
        ValueError, match=r"^FP8: A100 \(compute capability 8\.0, Ampere\) has no FP8 products; load 16"
    ):
        Session.load(LLAVA_TINY, bits="fp8", device="cpu")
    hopper = dataclasses.replace(ampere, has_fp8=True)
    monkeypatch.setattr(quantization, "capabilities_of", lambda device: hopper)
    Session.load(LLAVA_TINY, bits="fp8", device="cpu")


@pytest.mark.parametrize(
    ("product", "problem"),
    [
        (lambda *args: torch.zeros(8, 32), "FP8 products on cpu are wrong by 100%"),
        (lambda *args: torch.full((8, 32), torch.nan), "FP8 products on cpu are wrong by nan%"),
    ],
)
def test_wrong_products_are_noticed_at_the_start(monkeypatch, product, problem):
    assert linear.find_product_problem(torch.device("cpu")) is None
    monkeypatch.setattr(linear, "scaled_product", product)
    assert linear.find_product_problem(torch.device("cpu")) == problem
    with pytest.raises(ValueError, match=f"^{problem}; load 16, 8 or 4 bit$"):
        Session.load(LLAVA_TINY, bits="fp8", device="cpu")


def test_formats_exclude_each_other():
    with pytest.raises(ValueError, match=r"^load_8bit, load_4bit, load_fp8 exclude each other; pass one$"):
        load_pretrained_model(LLAVA_TINY, None, "x", load_4bit=True, load_fp8=True, device="cpu")
    with pytest.raises(ValueError, match=r"^bits is 'fp4'; choose 4, 8, 16 or 'fp8'$"):
        Session.load(LLAVA_TINY, bits="fp4", device="cpu")
