#!/usr/bin/env python3
"""Measure the tokens per second of one chat, against the bandwidth at which the device reads the weights.

The model is LLaVA-1.5-7B at its true sizes with random weights made on the device; one image, one answer at a time.
`tokens`, `tokens4` and `tokens8` (bits) compare ways to compute a token; `step` and `products` time its kernels alone.

Example: python benchmarks/chat_speed.py --output chat_speed.json
         python benchmarks/chat_speed.py --tiny --device cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from quantized_chat import IMAGE_SIZE, QUESTION, EndlessSession, answer_seconds, synchronize
from torch import nn
from vqa_workload import model_config, random_model

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.inference.chat.chat import Chat
from llava.inference.chat.kv_cache import ChatKVCache, GrowingKVCache, TransformersKVCache, load_fused_step
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.inference.session import Sampling, Session
from llava.model.devices import best_device
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import quantize_linears, quantized_parameter
from llava.tokenization.llama_tokenizer import load_tokenizer

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "data" / "goldens" / "llava-v1.5-golden"
VOCABULARY = 32_000
COPIED = 2**31
"""Bytes of the copy that shows the memory's speed."""
FEW = 32
"""Tokens of the ways that take long."""
TILES = ((1, 2048, 4), (1, 4096, 8), (2, 1024, 4), (2, 2048, 8), (4, 512, 4), (4, 1024, 4), (4, 1024, 8), (8, 512, 4))
REPLAYS = 10
LENGTHS = (640, 1_152, 4_096)
"""Positions in the cache."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for and print it row by row; return the exit code."""
    options = parse_options(argv)
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": describe_machine(device), "rows": []}
    print(report["machine"], flush=True)
    speed = copy_speed(device, COPIED >> 8 if options.tiny else COPIED)
    report["copy_bytes_per_second"] = speed
    print(f"copying: {speed / 1e12:.3f} TB/s read and written", flush=True)
    failed = 0
    for part in options.parts:
        try:
            for row in MEASURES[part](options, device, speed):
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if options.output:  # after each, so that nothing is lost
                    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except Exception:
            traceback.print_exc()
            failed = 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default=str(best_device()), help="default: %(default)s")
    add("--parts", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    add("--new-tokens", type=int, default=512, help="of an answer, above 1 (default: %(default)s)")
    add("--runs", type=int, default=3, help="answers timed, whose median counts (default: %(default)s)")
    add("--tiny", action="store_true", help="a tiny model, to try the program out")
    add("--output", type=Path, help="JSON to write")
    return parser.parse_args(argv)


def copy_speed(device: torch.device, size: int) -> float:
    """Return the bytes per second that the device reads and writes in a copy."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * size / statistics.median(seconds[2:])


def measure_tokens(
    options: argparse.Namespace, device: torch.device, speed: float, bits: int = 16
) -> Iterator[dict[str, Any]]:
    """Answers, for each way to compute a token."""
    session = build_session(device, bits=bits, tiny=options.tiny)
    read, image = bytes_per_token(session.model), Image.effect_noise(IMAGE_SIZE, 64).convert("RGB")
    length = session.spliced_length(session.prepare(QUESTION, [image]))
    for case, open_cache, sampling in cases(session, bits, options):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        chat = Chat(session, sampling, open_cache() if open_cache else None)
        n_tokens = sampling.max_new_tokens
        answer_seconds(chat, image, length, n_tokens, sampling)  # kernels are compiled, CUDA graphs captured
        first, whole = (
            statistics.median(answer_seconds(chat, image, length, number, sampling) for _ in range(options.runs))
            for number in (1, n_tokens)
        )
        rate = (n_tokens - 1) / (whole - first)
        row = {"part": "tokens", "case": f"{bits} bit, {case}", "new_tokens": n_tokens}
        row |= {"first_token_seconds": round(first, 4), "tokens_per_second": round(rate, 1), "weights_read": read}
        if device.type == "cuda":
            row["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        yield {**row, "share_of_limit": round(rate * read / speed, 3)}


def cases(
    session: Session, bits: int, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], ChatKVCache] | None, Sampling]]:
    """Yield names, caches (None = the one a chat chooses) and sampling."""
    greedy = Sampling(max_new_tokens=options.new_tokens)
    few = dataclasses.replace(greedy, max_new_tokens=min(FEW, options.new_tokens))
    is_cuda = session.model.device.type == "cuda"
    yield "greedy", None, few if bits == 8 and is_cuda else greedy
    if bits != 8:
        yield "temperature 0.2", None, dataclasses.replace(greedy, temperature=0.2, seed=0)
    if is_cuda and bits == 16:
        yield "temperature 0.2, top_p 0.9", None, dataclasses.replace(greedy, temperature=0.2, top_p=0.9, seed=0)
        llama = RaggedLlama(session.model)
        yield "layers, CUDA graphs", lambda: GrowingKVCache(llama, is_graphed=True), greedy
        yield "Triton kernels, no graphs", lambda: GrowingKVCache(llama, fused_step=load_fused_step(llama)), few
    if is_cuda and bits != 8:
        yield "layers, no graphs", lambda: GrowingKVCache(RaggedLlama(session.model)), few
    yield "transformers' forward", lambda: TransformersKVCache(session.model), few


def build_session(device: torch.device, *, bits: int, tiny: bool) -> Session:
    """Return a session around random weights, the LLM's quantised where they lie."""
    config = model_config(tiny=tiny)
    config.vocab_size, config.use_cache = VOCABULARY, True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(config, device, dtype).eval().requires_grad_(False)
    if bits != 16:
        layers = model.get_model().layers
        weights = {name: module.weight for name, module in layers.named_modules() if type(module) is nn.Linear}
        quantize_linears(layers, bits, dtype)
        for name in list(weights):
            module = layers.get_submodule(name)
            module.weight = quantized_parameter(module, weights.pop(name).data, dtype)
    processor = CLIPPixels(config.mm_vision_config["image_size"])
    template = get_template(DEFAULT_TEMPLATE)
    return EndlessSession(load_tokenizer(TOKENIZER), model, processor, template, config.max_position_embeddings)


def bytes_per_token(model: LlavaLlamaForCausalLM) -> int:
    """Return the bytes of all weights that a token needs: the LLM's layers and the head, statistics included."""
    modules = (model.get_model().layers, model.get_output_embeddings())
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def measure_products(options: argparse.Namespace, device: torch.device, speed: float) -> Iterator[dict[str, Any]]:
    """Products of a token with weights, for several tiles; every layer's in turn, so that none is in a cache."""
    kernels = import_kernels(device)
    if kernels is None:
        return
    llama = RaggedLlama(build_session(device, bits=16, tiny=options.tiny).model)
    mlp = llama.layers[0].mlp
    hidden, active, result = (
        torch.randn(width, device=device, dtype=llama.dtype)
        for width in (mlp.up_proj.in_features, mlp.down_proj.in_features, VOCABULARY)
    )
    calls: dict[str, list[Callable[..., None]]] = {"head": [multiply_by(kernels, hidden, [llama.head], result)] * 4}
    for layer in llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        for name, call in {
            "queries, keys, values": multiply_by(kernels, hidden, heads, result, norm=layer.input_layernorm),
            "output": multiply_by(kernels, hidden, [attention.o_proj], result, residual=result),
            "gate and up": functools.partial(
                kernels.gated_matvec, hidden, mlp.gate_proj, mlp.up_proj, result, norm=layer.input_layernorm
            ),
            "down": multiply_by(kernels, active, [mlp.down_proj], result, residual=result),
        }.items():
            calls.setdefault(name, []).append(call)
    for name, products in calls.items():
        weights = (linear.weight for part in products[0].args for linear in linears_in(part))
        read = sum(weight.nbytes for weight in weights)
        for tile in map(kernels.Tile._make, TILES):
            seconds = replay_seconds(functools.partial(run_all, products, tile=tile), device) / len(products)
            row = {"part": "products", "case": name, "tile": tuple(tile), "microseconds": round(seconds * 1e6, 2)}
            yield {**row, "share_of_limit": round(read / seconds / speed, 3)}


def multiply_by(kernels: Any, *arguments: Any, **options: Any) -> Callable[..., None]:
    """Return a product that still lacks its tile."""
    return functools.partial(kernels.matvec, *arguments, **options)


def linears_in(part: Any) -> list[nn.Linear]:
    """Return the linear layers that an argument of a product is."""
    parts = part if isinstance(part, list) else [part]
    return [linear for linear in parts if isinstance(linear, nn.Linear)]


def run_all(calls: Sequence[Callable[..., None]], **options: Any) -> None:
    """Call each."""
    for call in calls:
        call(**options)


def measure_step(options: argparse.Namespace, device: torch.device, speed: float) -> Iterator[dict[str, Any]]:
    """A token's attention, per layer, and the whole token, both as CUDA graphs without a chat."""
    kernels = import_kernels(device)
    if kernels is None:
        return
    model = build_session(device, bits=16, tiny=options.tiny).model
    llama, read = RaggedLlama(model), bytes_per_token(model)
    step = kernels.FusedDecodeStep(llama)
    heads, width = llama.key_shape
    for length in LENGTHS:
        cache = [
            tuple(torch.zeros(1, length, heads, width, device=device, dtype=llama.dtype) for _ in range(2))
            for _ in llama.layers
        ]
        entries = torch.tensor([5, length - 1], device=device)
        qkv = torch.randn(3 * heads * width, device=device, dtype=llama.dtype)
        partial = torch.empty(-(-length // kernels.SPLIT), heads, width + 2, device=device)
        attended = torch.empty_like(qkv[: heads * width])
        calls = [functools.partial(step.attend, entries, qkv, *layer, partial, attended) for layer in cache]
        seconds = replay_seconds(functools.partial(run_all, calls), device) / len(cache)
        row = {"part": "step", "case": f"attention, {length} positions", "microseconds": round(seconds * 1e6, 2)}
        yield {**row, "share_of_limit": round(2 * cache[0][0].nbytes / seconds / speed, 3)}
        seconds = replay_seconds(functools.partial(step, entries, cache), device)
        row = {"part": "step", "case": f"token, {length} positions", "microseconds": round(seconds * 1e6, 2)}
        yield {**row, "share_of_limit": round(read / seconds / speed, 3)}


def import_kernels(device: torch.device) -> Any:
    """Return the module of kernels; None, with a line, where there are none."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        print("kernels need CUDA and Triton", flush=True)
        return None
    from llava.inference.chat import decode_step

    return decode_step


@torch.no_grad()
def replay_seconds(compute: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of work as a CUDA graph."""
    compute()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    seconds = [timed(lambda: [graph.replay() for _ in range(REPLAYS)], device) / REPLAYS for _ in range(7)]
    return statistics.median(seconds[2:])


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of an action, what it gives the device included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def describe_machine(device: torch.device) -> str:
    """Return device and versions in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return ", ".join(
        [name, *(f"{library} {importlib.metadata.version(library)}" for library in ("torch", "transformers"))]
    )


MEASURES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "tokens": measure_tokens,
    "step": measure_step,
    "products": measure_products,
    "tokens4": functools.partial(measure_tokens, bits=4),
    "tokens8": functools.partial(measure_tokens, bits=8),
}


if __name__ == "__main__":
    sys.exit(main())
