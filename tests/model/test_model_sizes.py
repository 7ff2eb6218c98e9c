"""LLaVA-1.5-13B's proportions at tiny widths: such weights load, train, merge and answer as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.clip_image_processor import CLIPPixels
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.session import Sampling, Session
from llava.model.checkpoint.checkpoint import open_checkpoint, save_checkpoint
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import VIT_L_14_336
from llava.train.train import main as train

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {  # vocabulary: the tokenizer has 32,000 tokens
    "the 40 heads of 13B": {"heads": 40, "width": 4, "layers": 3, "vocabulary": 32_000},
    "40 heads, 40 layers, padded vocabulary": {"heads": 40, "width": 2, "layers": 40, "vocabulary": 32_003},
    "5 heads, 1 layer, odd vocabulary": {"heads": 5, "width": 6, "layers": 1, "vocabulary": 32_001},
}
IMAGES = ("landscape.jpg", "portrait.png", "wide.png")
QUESTION = "What are the  colors of the bikes?"
GREEDY = Sampling(max_new_tokens=6)


def llm_sizes(heads, width, layers, vocabulary):
    """An LLM with 13B's proportions: its feed-forward part is 13,824 of 5,120 wide, which is 2.7."""
    hidden = heads * width
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 27 // 10,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
    }


@torch.no_grad()
def random_language_model(config):
    """Every tensor but the vision tower's, wide enough for answers that differ."""
    model = LlavaLlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    named = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" not in name}
    for name, tensor in named.items():
        if "norm" not in name:
            spread = 1.0 if "embed_tokens" in name else 2 * tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return named


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request, goldens, tokenizer, tmp_path_factory):
    """A released directory: the golden vision tower under a random LLM of these sizes."""
    golden = open_checkpoint(goldens / "llava-v1.5-golden")
    tower = golden.tensors.renamed(lambda name: name if "vision_tower" in name else None)
    config = LlavaConfig.from_dict({**golden.config.to_dict(), **llm_sizes(**SIZES[request.param])})
    tensors = tower.overlaid(LazyTensors.of(random_language_model(config)).entries)
    directory = tmp_path_factory.mktemp("sizes") / "llava"
    directory.mkdir()
    save_checkpoint(tensors, config, tokenizer, CLIPPixels(config.mm_vision_config["image_size"]), directory)
    return directory


@pytest.fixture(scope="module")
def finetuned(checkpoint, goldens, load_program, tmp_path_factory):
    """The directory after one step of LoRA, merged; the program's output beside it."""
    folder = tmp_path_factory.mktemp("finetuned")
    rows = [
        {
            "id": str(index),
            "image": IMAGES[index % len(IMAGES)],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich is {index}?"},
                {"from": "gpt", "value": f"it is {index}"},
            ],
        }
        for index in range(4)
    ]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--model_name_or_path", checkpoint, "--data_path", folder / "data.json", "--output_dir", folder / "lora"]
    words += ["--image_folder", goldens / "images", "--use_cpu", "True", "--lora_enable", "True", "--lora_r", "4"]
    words += ["--per_device_train_batch_size", "4", "--max_steps", "1", "--learning_rate", "1e-3", "--report_to"]
    words += [
        "none",
        "--save_strategy",
        "no",
        "--model_max_length",
        "256",
        "--disable_tqdm",
        "True",
        "--logging_steps",
        "1",
    ]
    assert train([str(word) for word in words]) == 0
    words = ["--model-path", folder / "lora", "--model-base", checkpoint, "--save-model-path", folder / "merged"]
    merge = load_program("scripts/merge_lora_weights.py").main
    assert merge([*(str(word) for word in words), "--device", "cpu"]) == 0
    return folder


def open_session(directory):
    return Session.load(str(directory), device="cpu", dtype="float32")


def test_it_loads_with_the_sizes_it_has(checkpoint):
    session = open_session(checkpoint)
    written = open_weights(checkpoint)
    loaded = {name: tensor for name, tensor in session.model.state_dict().items() if "vision_tower" not in name}
    assert all(torch.equal(tensor, written[name]) for name, tensor in loaded.items())
    assert session.model.lm_head.weight.shape[0] == session.model.config.vocab_size


def test_it_answers_as_transformers_does(checkpoint, goldens, load_program, tmp_path):
    convert = load_program("scripts/convert_checkpoint.py").main
    assert convert(["--from", str(checkpoint), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 0
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    session = open_session(checkpoint)
    questions = [Question(index, QUESTION, (name,)) for index, name in enumerate(IMAGES)]
    answers = answer_batch(session, questions, goldens / "images", GREEDY, workers=0)
    ours = {answer.question.images[0]: answer.text for answer in answers}
    assert len(set(ours.values())) > 1
    for name in IMAGES:
        image = Image.open(goldens / "images" / name).convert("RGB")
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ours[name] == answer.strip(), name


def test_a_step_of_lora_is_merged_to_what_base_and_adapter_give(finetuned, checkpoint):
    log = [json.loads(line) for line in (finetuned / "lora/train_log.jsonl").read_text().splitlines()]
    assert [line["loss"] > 0 for line in log if "loss" in line] == [True]
    merged, base = open_weights(finetuned / "merged"), open_weights(checkpoint)
    assert {name: merged.entries[name].shape for name in merged} == {name: base.entries[name].shape for name in base}
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


RELEASED = {  # hidden, intermediate, layers and heads of the config; GB (10^9 bytes) of LLM and projector in 16 bit
    "llava-v1.5-7b": ((4096, 11_008, 32, 32), 13.5),
    "llava-v1.5-13b": ((5120, 13_824, 40, 40), 26.1),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_those_of_the_documents(name):
    (hidden, intermediate, layers, heads), gigabytes = RELEASED[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "mm_vision_config": VIT_L_14_336, "mm_hidden_size": 1024}
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(LlavaConfig(**sizes, mm_projector_type="mlp2x_gelu"))
    tensors = {key: tensor for key, tensor in model.state_dict().items() if "vision_tower" not in key}
    assert round(2 * sum(tensor.numel() for tensor in tensors.values()) / 1e9, 1) == gigabytes
    row = next(
        line for line in (ROOT / "docs/models.md").read_text("utf-8").splitlines() if f"`liuhaotian/{name}`" in line
    )
    assert f"{gigabytes} GB" in row
