"""The calls that evaluation harnesses make, on the embedded model: their answers are those of a session."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.image_files.decode import open_image
from llava.inference.session import Sampling, Session
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model

MODEL = str(Path(__file__).resolve().parents[1] / "playground/llava-tiny")
QUESTIONS = ["How many red circles are there?", "Is there a star?"]


@pytest.fixture(scope="module")
def session():
    return Session.load(MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def images(goldens):
    return [open_image(goldens / "images" / name) for name in ("landscape.jpg", "portrait.png")]


@pytest.fixture(scope="module")
def expected(session, images):
    prompts = [session.prepare(question, [image]) for question, image in zip(QUESTIONS, images, strict=True)]
    return session.answer_prompts(prompts, Sampling(max_new_tokens=8))


def load_as_lmms_eval():
    """It passes `multimodal` first and falls back on a TypeError."""
    options = {"multimodal": True, "attn_implementation": "sdpa", "torch_dtype": "float32"}
    name = get_model_name_from_path(MODEL)
    tokenizer, model, processor, length = load_pretrained_model(MODEL, None, name, device_map="cpu", **options)
    model.eval()
    model.tie_weights()
    return tokenizer, model.to(torch.device("cpu")), processor, length


@torch.inference_mode()
def test_lmms_eval_generates(images, expected):
    tokenizer, model, processor, length = load_as_lmms_eval()
    assert length == 2048
    images = process_images(images, processor, model.config).to(dtype=torch.float16, device="cpu")
    prompts = []
    for question in QUESTIONS:
        dialogue = conv_templates["vicuna_v1"].copy()
        dialogue.append_message(dialogue.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        dialogue.append_message(dialogue.roles[1], None)
        prompts.append(tokenizer_image_token(dialogue.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad)
    answers = model.generate(
        input_ids, attention_mask=input_ids.ne(pad), pad_token_id=pad, images=images,
        image_sizes=[image.size for image in images], do_sample=False, temperature=0, top_p=None, num_beams=1,
        max_new_tokens=8, use_cache=True,
    )  # fmt: skip
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == expected


@torch.inference_mode()
def test_lmms_eval_scores_continuations(images, expected):
    tokenizer, model, processor, _ = load_as_lmms_eval()
    image = process_images(images[:1], processor, model.config)
    losses = {}
    for answer in (expected[0], "nonsense"):
        dialogue = conv_templates["vicuna_v1"].copy()
        dialogue.append_message(dialogue.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTIONS[0]}")
        dialogue.append_message(dialogue.roles[1], None)
        start = tokenizer_image_token(dialogue.get_prompt(), tokenizer, return_tensors="pt")[None]
        dialogue.messages[1][1] = answer
        ids = tokenizer_image_token(dialogue.get_prompt(), tokenizer, return_tensors="pt")[None]
        labels = ids.clone()
        labels[0, : start.shape[1]] = -100
        sizes = [[images[0].width, images[0].height]]
        losses[answer] = model(input_ids=ids, labels=labels, images=image, use_cache=True, image_sizes=sizes)["loss"]
    assert losses[expected[0]] < losses["nonsense"]


@torch.inference_mode()
def test_vlmevalkit_generates(images, session):
    tokenizer, model, processor, _ = load_pretrained_model(
        model_path=MODEL,
        model_base=None,
        model_name=get_model_name_from_path(MODEL),
        device_map="cpu",
        torch_dtype="float32",
    )
    system = conv_templates["llava_v1"].system
    pixels = process_images(images[:1], processor, Namespace(image_aspect_ratio="pad")).to("cpu", dtype=torch.float16)
    prompt = f"{system} USER: <image> {QUESTIONS[0]} ASSISTANT: "
    input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
    criteria = [KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)]
    output = model.generate(
        input_ids, images=pixels, stopping_criteria=criteria, do_sample=False, temperature=0, max_new_tokens=2048,
        top_p=None, num_beams=1, use_cache=True,
    )  # fmt: skip
    assert output[0, -1] == tokenizer.eos_token_id
    assert 0 < len(tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()) < 200
