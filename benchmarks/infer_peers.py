"""The questions of a benchmark through transformers, and through vLLM where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from infer_bench import ANSWER_TOKENS, CAPTION_TOKENS, Bench, fill, image_reader, made_on, synchronize
from vllm_peer import Peer, export_hf, make_prompts

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.engine.image_loader import default_workers, prefetch_images
from llava.model.configuration import LlavaConfig


@torch.no_grad()
def measure_transformers(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same questions through `LlavaForConditionalGeneration`, left-padded.

    Images are decoded ahead by processes, as for ours; and, to tell the model's speed from theirs, ready on the device.
    """
    session, options = bench.session, bench.options
    questions = bench.questions(options.peer_images)
    prompts = [session.prompt_ids(question.text, 1) for question in questions]
    reader = image_reader(bench)
    bench.free_session()
    del session
    model = build_peer(bench.config, bench.device)
    image_id = model.config.image_token_id
    patches = (bench.config.mm_vision_config["image_size"] // bench.config.mm_vision_config["patch_size"]) ** 2
    rows = [
        [part for token in ids for part in ([image_id] * patches if token == IMAGE_TOKEN_INDEX else [token])]
        for ids in prompts
    ]
    workers = default_workers(bench.device) if options.workers is None else options.workers
    for size in options.peer_batches:
        ready = [[reader.load(question.images)[0].to(bench.device)] for question in questions[:size]]
        generate_peer(model, rows[:size], ready)  # warm-up
        for case in ("", ", pixels ready"):
            synchronize(bench.device)
            start = time.perf_counter()
            files = [question.images for question in questions]
            images = itertools.cycle(ready) if case else prefetch_images(reader, files, workers=workers)
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                generate_peer(model, batch, list(itertools.islice(images, len(batch))))
            synchronize(bench.device)
            seconds = time.perf_counter() - start
            rate = len(rows) / seconds
            name = f"transformers, batch {size}{case}"
            yield {"part": "transformers", "case": name, "questions_per_second": rate, "seconds": seconds}


def build_peer(config: LlavaConfig, device: torch.device) -> transformers.LlavaForConditionalGeneration:
    """Return transformers' LLaVA of the same sizes with random weights."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {key: getattr(config, key) for key in keys}
    text |= {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    vision = {"model_type": "clip_vision_model", **config.mm_vision_config}
    settings = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    with made_on(device):
        model = transformers.LlavaForConditionalGeneration(settings).eval()
    fill(model, 2)
    return model


def generate_peer(model: torch.nn.Module, rows: Sequence[list[int]], images: Sequence[Any]) -> None:
    """Generate three tokens for each row of ids."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    device = model.device
    pixels = torch.stack([image[0] for image in images]).to(device)
    tokens = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), pixel_values=pixels, **tokens).cpu()


def measure_vllm(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same questions and weights through vLLM, where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        print("vllm: left out, it is not installed", flush=True)
        return
    session, images = bench.session, bench.options.images
    in_order = bench.questions(images)
    shuffled = random.Random(0).sample(in_order, len(in_order))
    cases = {
        "4.24 questions per image": (in_order, ANSWER_TOKENS),
        "the same shuffled": (shuffled, ANSWER_TOKENS),
        "one question per image": (bench.single_questions(max(1, images * 2 // 3)), ANSWER_TOKENS),
    }
    for count in bench.options.captions:
        cases[f"{min(count, images)} captions"] = (bench.captions(min(count, images)), CAPTION_TOKENS)
    prompts = {case: make_prompts(session, questions) for case, (questions, _) in cases.items()}
    directory = bench.folder / "llava-hf"
    directory.mkdir()
    export_hf(session, directory)
    longest = max(map(len, itertools.chain(*prompts.values()))) + session.model.get_vision_tower().num_patches
    bench.free_session()
    del session
    peer = Peer(importlib.import_module("vllm"), directory, longest + CAPTION_TOKENS)
    for case, (questions, new_tokens) in cases.items():
        images = [bench.folder / question.images[0] for question in questions]
        warm = max(1, len(questions) // 16)
        peer.answer(prompts[case][-warm:], images[-warm:], new_tokens)
        seconds = peer.answer(prompts[case], images, new_tokens)
        yield {
            "part": "vllm",
            "case": f"vLLM, {case}",
            "questions_per_second": len(questions) / seconds,
            "tokens_per_second": len(questions) * new_tokens / seconds,
            "seconds": seconds,
        }
    peer.close()
