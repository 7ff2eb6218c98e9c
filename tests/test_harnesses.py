"""The calls of lmms-eval's `llava` and VLMEvalKit's `LLaVA`: results equal those of the batch engine and of `forward`.

The classes themselves, at lmms-eval 0.7.2 and VLMEvalKit 0.2rc1, were run unchanged; their calls are written out here.
"""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.image_files.decode import open_image
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.session import Sampling, Session
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model import placement
from llava.model.builder import load_pretrained_model

REPOSITORY = Path(__file__).resolve().parents[1]
NEW_TOKENS = 12
IMAGES = ("landscape.jpg", "portrait.png", None)
QUESTIONS = [
    Question(number, text, () if image is None else (image,))
    for number, (image, text) in enumerate(
        (image, text)
        for image in IMAGES
        for text in ("Is there a star?", "How many red circles are there?\nAnswer the question using a single word.")
    )
]
LABELS = ("yes", "no", "a red circle")


@pytest.fixture(scope="module", params=["tests/data/goldens/llava-v1.5-golden", "playground/llava-tiny"])
def model_path(request):
    return str(REPOSITORY / request.param)


@pytest.fixture(scope="module")
def answers(model_path, goldens):
    """Return the function (sampling, options) -> answers of the batch engine, by the question's number."""
    session = Session.load(model_path, device="cpu", dtype="float32")

    def answer(sampling=None, **options):
        found = answer_batch(session, QUESTIONS, goldens / "images", sampling, **options)
        return {answer.question.question_id: answer for answer in found}

    return answer


class LmmsEval:
    """The calls of lmms-eval's class, on the CPU."""

    def __init__(self, model_path, images, device_map="auto", **options):
        options = {"multimodal": True, "attn_implementation": "sdpa", **options}
        name = get_model_name_from_path(model_path)
        loaded = load_pretrained_model(model_path, None, name, device_map=device_map, **options)
        self.tokenizer, self.model, self.processor, self.max_length = loaded
        self.config, self.device, self.images = self.model.config, torch.device("cpu"), images
        self.model.eval()
        self.model.tie_weights()
        self.model.to(self.device)

    def pixels(self, images):
        """Return pixels in half precision, whatever the weights' dtype; None without images."""
        if not images:
            return None
        found = process_images(images, self.processor, self.config)
        if type(found) is list:
            return [image.to(dtype=torch.float16, device=self.device) for image in found]
        return found.to(dtype=torch.float16, device=self.device)

    def dialogue(self, question):
        dialogue = conv_templates["vicuna_v1"].copy()
        mark = f"{DEFAULT_IMAGE_TOKEN}\n" if question.images else ""
        dialogue.append_message(dialogue.roles[0], mark + question.text)
        dialogue.append_message(dialogue.roles[1], None)
        return dialogue

    def encode(self, prompt):
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    def generate(self, questions):
        images = [open_image(self.images / name) for question in questions for name in question.images]
        prompts = [self.encode(self.dialogue(question).get_prompt()) for question in questions]
        tokenizer = self.tokenizer
        pad_token_ids = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        assert tokenizer.padding_side == "right"
        input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad_token_ids)
        output = self.model.generate(
            input_ids.to(self.device),
            attention_mask=input_ids.ne(pad_token_ids).to(self.device),
            pad_token_id=pad_token_ids,
            images=self.pixels(images),
            image_sizes=[image.size for image in images],
            do_sample=False,
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=NEW_TOKENS,
            use_cache=True,
        )
        return tokenizer.batch_decode(output, skip_special_tokens=True)

    def mean_loss(self, question, answer):
        """Return the mean loss of the answer's tokens and its end, how many these are, and the shape of the logits."""
        images = [open_image(self.images / name) for name in question.images]
        dialogue = self.dialogue(question)
        context = self.encode(dialogue.get_prompt()).unsqueeze(0)
        dialogue.messages[1][1] = answer
        input_ids = self.encode(dialogue.get_prompt()).unsqueeze(0).to(self.device)
        labels = input_ids.clone()
        labels[0, : context.shape[1]] = IGNORE_INDEX
        sizes = [[image.size[0], image.size[1]] for image in images]
        output = self.model(
            input_ids=input_ids, labels=labels, images=self.pixels(images), use_cache=True, image_sizes=sizes
        )
        return output["loss"].item(), int((labels != IGNORE_INDEX).sum()), output["logits"].argmax(dim=-1).shape


@pytest.fixture(scope="module")
def lmms_eval(model_path, goldens):
    return LmmsEval(model_path, goldens / "images")


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@torch.inference_mode()
def test_lmms_eval_generates_what_the_batch_engine_generates(lmms_eval, answers, batch_size):
    """Short and long prompts share a batch, right-padded; the last two are text alone."""
    expected = answers(Sampling(max_new_tokens=NEW_TOKENS))
    found = []
    for start in range(0, len(QUESTIONS), batch_size):
        found += lmms_eval.generate(QUESTIONS[start : start + batch_size])
    assert [text.strip() for text in found] == [expected[number].text for number in range(len(QUESTIONS))]


@torch.inference_mode()
def test_lmms_eval_scores_what_choices_score(lmms_eval, answers):
    """The harness reports the mean loss, the engine the sum of the log-probabilities; images add only positions."""
    scored = answers(choices=LABELS)
    for question in QUESTIONS:
        patches = lmms_eval.model.get_vision_tower().num_patches
        for label in LABELS:
            loss, count, shape = lmms_eval.mean_loss(question, label)
            expected = scored[question.question_id].scores["choices"][label]
            assert -loss * count == pytest.approx(expected, abs=0.01)  # pixels of the harness are rounded to fp16
            length = len(lmms_eval.encode(lmms_eval.dialogue(question).get_prompt())) + count
            assert shape == (1, length + len(question.images) * (patches - 1))


def test_device_maps_of_lmms_eval(goldens, monkeypatch):
    """`auto` where it is passed on, else the process's GPU, which the CPU stands for here; "" is no choice."""
    path, asked = str(goldens / "llava-v1.5-golden"), []
    parse = placement.parse_device

    def stand_in(value, *rest):
        asked.append(value)
        return parse("cpu" if str(value).startswith("cuda") else value, *rest)

    monkeypatch.setattr(placement, "parse_device", stand_in)
    for device_map in ("auto", "", "cuda:0", "cuda:1"):
        assert LmmsEval(path, None, device_map).model.device == torch.device("cpu")
    assert list(dict.fromkeys(asked)) == ["cuda:0", "cuda:1"]


def test_options_of_lmms_eval(goldens, tmp_path):
    path = str(goldens / "llava-v1.5-golden")
    settings = tmp_path / "custom.json"
    settings.write_text(json.dumps({"image_aspect_ratio": "square"}))
    loaded = LmmsEval(path, None, attn_implementation="eager", customized_config=str(settings))
    assert loaded.config.image_aspect_ratio == "square"
    assert loaded.config._attn_implementation == "eager"
    assert loaded.max_length == loaded.config.tokenizer_model_max_length == 256
    with pytest.raises(TypeError, match="unexpected keyword argument 'multimodality'"):  # then it tries without
        LmmsEval(path, None, multimodality=True)


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "llava_llama_2", "plain"])
def test_templates_are_copied_both_ways(name):
    """Some harnesses copy with `copy.deepcopy`, others with the template's own `copy`."""
    prompts = []
    for dialogue in (copy.deepcopy(conv_templates[name]), conv_templates[name].copy()):
        dialogue.append_message(dialogue.roles[0], "<image>\nWhat?")
        dialogue.append_message(dialogue.roles[1], None)
        dialogue.messages[1][1] = "a cat"
        prompts.append(dialogue.get_prompt())
    assert prompts[0] == prompts[1]
    assert "a cat" in prompts[0]
    assert not conv_templates[name].messages


class VLMEvalKit:
    """The calls of VLMEvalKit's class; the CPU stands for its GPU."""

    def __init__(self, model_path):
        self.tokenizer, self.model, self.processor, self.context_len = load_pretrained_model(
            model_path=model_path,
            model_base=None,
            model_name=get_model_name_from_path(model_path),
            device_map="cpu",
        )
        self.system = conv_templates["llava_v1"].system

    def encode(self, content):
        prompt = f"{self.system} USER: {content} ASSISTANT: "
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)

    def pixels(self, images):
        if not images:
            return None
        settings = Namespace()
        settings.image_aspect_ratio = "pad"
        return process_images(images, self.processor, settings).to("cpu", dtype=torch.float16)

    def generate(self, content, images, max_new_tokens):
        input_ids = self.encode(content)
        criteria = KeywordsStoppingCriteria(["</s>"], self.tokenizer, input_ids)
        return self.model.generate(
            input_ids,
            images=self.pixels(images),
            stopping_criteria=[criteria],
            do_sample=False,
            temperature=0,
            max_new_tokens=max_new_tokens,
            top_p=None,
            num_beams=1,
            use_cache=True,
        )


@pytest.fixture(scope="module")
def vlmevalkit(model_path):
    return VLMEvalKit(model_path)


@pytest.mark.parametrize("names", [(), ("landscape.jpg",), ("landscape.jpg", "portrait.png")])
@torch.inference_mode()
def test_vlmevalkit_generates_the_likeliest_token_of_each_forward_pass(vlmevalkit, goldens, names):
    images = [open_image(goldens / "images" / name) for name in names]
    content = " <image> " * len(names) + "Is there a star?\nAnswer with the option's letter."
    output = vlmevalkit.generate(content, images, NEW_TOKENS)[0]
    assert 1 <= len(output) <= NEW_TOKENS
    ids, end = vlmevalkit.encode(content), vlmevalkit.tokenizer.eos_token_id
    for token in output:
        logits = vlmevalkit.model(input_ids=ids, images=vlmevalkit.pixels(images)).logits
        assert logits[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    assert end not in output[:-1].tolist()
    assert len(output) == NEW_TOKENS or output[-1] == end


@torch.inference_mode()
def test_vlmevalkit_stops_at_the_end_of_the_answer(goldens):
    """Its limit of 2,048 tokens is as long as the context of the embedded model."""
    harness = VLMEvalKit(str(REPOSITORY / "playground/llava-tiny"))
    output = harness.generate(" <image> Is there a star?", [open_image(goldens / "images" / "landscape.jpg")], 2048)
    assert output[0, -1] == harness.tokenizer.eos_token_id
    assert 0 < len(harness.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()) < 200
