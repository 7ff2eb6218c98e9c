#!/usr/bin/env python3
"""Measure batch answering at LLaVA-1.5-7B's sizes with random weights: image files to answers on disk, in one run.

Questions are a sample of VQAv2's, with its numbers of questions per picture; pictures are drawn noise, 640 x 480 JPEG.
Every answer has exactly three tokens, a caption 128. The same questions go to transformers'
`LlavaForConditionalGeneration`, to vLLM where it is installed, with the same weights, and a part of them one at a time
to our own model, to count how often answers agree.

Example: python benchmarks/infer_speed.py --output speed.json
         python benchmarks/infer_speed.py --parts --profile      (only where the device waits)
         python benchmarks/infer_speed.py --tiny --images 20      (on a CPU, to try it out)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).parent))

from device_share import as_lines, device_share, device_spans
from vllm_peer import Peer, export_hf, make_prompts

from llava.constants import DEFAULT_TEMPLATE, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.image_processing import CLIPPixels
from llava.inference import tree_cache
from llava.inference.answers import AnswersFile
from llava.inference.backlog import Backlog
from llava.inference.grouped import answer_batch
from llava.inference.grouping import Ask, plan_groups
from llava.inference.picture_source import PictureReader, default_workers, read_pictures
from llava.inference.questions import Question
from llava.inference.ranks import Ranks
from llava.inference.session import Sampling, Session
from llava.inference.tree_cache import TreeCache
from llava.inference.tree_rows import round_up
from llava.model.configuration import LlavaConfig
from llava.model.devices import best_device
from llava.model.flat_llama import FlatLlama
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import VIT_L_14_336
from llava.tokenization import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "benchmarks" / "vqa_sample.json"
TOKENIZER = REPOSITORY / "tests" / "data" / "goldens" / "llava-v1.5-golden"
PARTS = ("ceiling", "attention", "grouped", "shuffled", "single", "captions", "agreement", "transformers", "vllm")
ANSWER_TOKENS, CAPTION_TOKENS = 3, 128
SPREAD = 0.02
CAPTION_PROMPT = "Describe the picture in detail."
DRAWN = 96
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that are asked for, each printed at once; return the exit code."""
    options = parse_options(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llava").setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": describe_machine(device), "rows": []}
    print(report["machine"], flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        drawn = time.perf_counter()
        draw_pictures(Path(folder), options.images, picture_size(options.tiny))
        print(f"drew pictures in {time.perf_counter() - drawn:.1f} s", flush=True)
        bench = Bench(options, device, Path(folder))
        for part in order_parts(options):
            if time.perf_counter() - start > options.budget:
                print(f"{part}: left out, the budget of {options.budget} s is spent", flush=True)
                continue
            if not measure(bench, part, report):
                print("once more without CUDA graphs", flush=True)
                tree_cache.StepGraphs = lambda: None
                measure(bench, part, report)
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{as_table(report['rows'])}\n\n{report['seconds']} s in all", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if "failed" in report else 0


def measure(bench: Bench, part: str, report: dict[str, Any]) -> bool:
    """Measure a part and print its rows at once; return whether that went well."""
    try:
        for row in MEASURES[part](bench):
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
    except Exception:  # the other parts are worth having
        print(f"{part} failed:\n{traceback.format_exc()}", flush=True)
        report["failed"] = [*report.get("failed", []), part]
        return False
    return True


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    add("--images", type=int, default=1500, help="pictures of the grouped parts (default: %(default)s)")
    add("--captions", type=int, nargs="+", default=[64, 128, 320], help="at once or in all (default: %(default)s)")
    add("--compared", type=int, default=96, help="questions asked one at a time as well (default: %(default)s)")
    add("--peer-images", type=int, default=120, help="pictures for transformers (default: %(default)s)")
    add("--peer-batches", type=int, nargs="+", default=[32, 64], help="its batch sizes (default: %(default)s)")
    add("--compile", choices=("on", "off"), help="default: on with CUDA")
    add("--workers", type=int, help="processes that decode pictures (default: what suits the device)")
    add("--device", default=str(best_device()), help="default: %(default)s")
    add("--budget", type=float, default=480, help="seconds after which no further part starts (default: %(default)s)")
    add("--tiny", action="store_true", help="a tiny model in fp32 and tiny pictures")
    add("--profile", action="store_true", help="print how busy the device is, before what it waits, and its kernels")
    add("--verbose", action="store_true", help="print what the engine decides")
    add("--output", type=Path, help="JSON to write")
    return parser.parse_args(argv)


def order_parts(options: argparse.Namespace) -> list[str]:
    """Return the parts that are asked for, those with our model first."""
    wanted = {*options.parts, *(["profile"] if options.profile else [])}
    return [part for part in MEASURES if part in wanted]


class Bench:
    """What the parts share: options, pictures on disk, our model.

    Args:
        options: of the command line.
        device: where everything runs.
        folder: holds the pictures; answers are written there.
        ranks: this process among those that share the work.
    """

    def __init__(
        self, options: argparse.Namespace, device: torch.device, folder: Path, ranks: Ranks | None = None
    ) -> None:
        self.options, self.device, self.folder, self.ranks = options, device, folder, ranks or Ranks()
        self.compile_mode = options.compile or ("on" if device.type == "cuda" else "off")
        self.texts = json.loads(SAMPLE.read_text(encoding="utf-8"))["images"]
        self.config = model_config(options.tiny)
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """Our model with random weights, made on the device; the first use is slow."""
        if self._session is None:
            start = time.perf_counter()
            self._session = build_session(self.config, self.device)
            print(f"built our model in {time.perf_counter() - start:.1f} s", flush=True)
        return self._session

    def free_session(self) -> None:
        """Give the memory of our model back."""
        self._session = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def questions(self, n_images: int) -> list[Question]:
        """Return the sample's questions about so many pictures, picture by picture."""
        rows = [(number, text) for number in range(n_images) for text in self.texts[number % len(self.texts)]]
        return [Question(key, text, (picture_name(number),)) for key, (number, text) in enumerate(rows)]

    def single_questions(self, n_images: int) -> list[Question]:
        """Return the first question about each picture."""
        return [
            Question(number, self.texts[number % len(self.texts)][0], (picture_name(number),))
            for number in range(n_images)
        ]

    def captions(self, n_images: int) -> list[Question]:
        """Return the wish for a long answer about each picture."""
        return [Question(number, CAPTION_PROMPT, (picture_name(number),)) for number in range(n_images)]

    def answer(
        self, questions: Sequence[Question], new_tokens: int, wait: Callable[[], None] = lambda: None, **more: Any
    ) -> float:
        """Answer questions into a file on disk and return the seconds that took.

        Args:
            questions: of all processes.
            new_tokens: of an answer.
            wait: returns when all processes have called it.
            more: options of `answer_batch`.
        """
        path, session = self.folder / "answers.jsonl", self.session
        rank, n_ranks, _ = self.ranks
        wait()
        start = time.perf_counter()
        with AnswersFile(path, questions, {"benchmark": True}, overwrite=True, rank=rank, n_ranks=n_ranks) as answers:
            wait()
            answers.begin()
            rows = answer_batch(
                session,
                questions,
                self.folder,
                Sampling(max_new_tokens=new_tokens),
                compile_mode=self.compile_mode,
                workers=self.options.workers,
                part=rank,
                parts=n_ranks,
                **more,
            )
            with contextlib.closing(rows):
                for answer in rows:
                    if answer.error:
                        raise RuntimeError(f"{answer.error}: {answer.message}")
                    answers.write(answer, "random")
            wait()
            if rank == 0:
                answers.finish()
        return time.perf_counter() - start


def model_config(is_tiny: bool) -> LlavaConfig:
    """Return LLaVA-1.5-7B's sizes, or tiny ones."""
    vision = {**VIT_L_14_336, **(TINY_VISION if is_tiny else {})}
    return LlavaConfig(
        **(TINY_TEXT if is_tiny else {}),
        max_position_embeddings=4096,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        mm_vision_config=vision,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
        conversation_template=DEFAULT_TEMPLATE,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, end_id: int) -> None:
    """Give a model random weights, of which none ends an answer."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(std=SPREAD)
    model.get_output_embeddings().weight[end_id] = 0  # logit 0, far below the largest of 32,000


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Make models on a device, in bf16 if it is a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_session(config: LlavaConfig, device: torch.device) -> Session:
    """Return a session around random weights."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    with made_on(device):
        model = LlavaLlamaForCausalLM(config).eval()
    fill(model, tokenizer.eos_token_id)
    processor = CLIPPixels(config.mm_vision_config["image_size"])
    return Session(tokenizer, model, processor, get_template(DEFAULT_TEMPLATE), config.max_position_embeddings)


def picture_size(is_tiny: bool) -> tuple[int, int]:
    """Return width and height of the pictures."""
    return (64, 48) if is_tiny else (640, 480)


def picture_name(number: int) -> str:
    """Return the file name of a picture."""
    return f"{number:06d}.jpg"


def draw_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write noise as JPEG; beyond the first 96, files are links to these."""
    for number in range(count):
        path = folder / picture_name(number)
        if number < DRAWN:
            channels = [Image.effect_noise(size, 64) for _ in range(3)]
            Image.merge("RGB", channels).save(path, quality=85)
        else:
            os.link(folder / picture_name(number % DRAWN), path)


def measure_ceiling(bench: Bench) -> Iterator[dict[str, Any]]:
    """What the device computes in a large product."""
    size = 512 if bench.options.tiny else 8192
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize(bench.device)
        start = time.perf_counter()
        left @ right
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    yield {"part": "ceiling", "case": f"product {size}^3", "tflops": 2 * size**3 / statistics.median(seconds) / 1e12}


ATTENTION_CASES = {
    "trunks": (24, 576, 616),
    "whole rows": (24, 640, 688),
    "branches": (24, 72, 688),
    "step": (128, 1, 768),
    "step of 8": (96, 8, 768),
}
"""Rows, queries and keys of the engine's calls."""


@torch.no_grad()
def measure_attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ways to compute attention at the engine's shapes."""
    for case, (rows, queries, keys) in ATTENTION_CASES.items():
        ways = ways_to_attend(bench, 2 if bench.options.tiny else rows, queries, keys)
        for way, compute in ways.items():
            first, taken = microseconds(compute, bench.device)
            yield {"part": "attention", "case": f"{case}: {way}", "microseconds": taken, "first_microseconds": first}


def ways_to_attend(bench: Bench, rows: int, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    """Return calls of the same size by PyTorch's kernels, with an added mask, as a square, and without a mask."""
    heads, width = (2, 16) if bench.options.tiny else (32, 128)
    made = {"device": bench.device, "dtype": torch.bfloat16 if bench.device.type == "cuda" else torch.float32}
    query = torch.randn(rows, queries, heads, width, **made).transpose(1, 2)
    key, value = (torch.randn(rows, keys + 56, heads, width, **made)[:, :keys].transpose(1, 2) for _ in range(2))
    bias = torch.zeros(rows, 1, queries, keys, **made)
    attend = torch.nn.functional.scaled_dot_product_attention
    pad = torch.nn.functional.pad

    def square() -> Any:
        return attend(
            pad(query.transpose(1, 2), (0, 0, 0, 0, keys - queries, 0)).transpose(1, 2), key, value, None, 0, True
        )

    ways: dict[str, Callable[[], Any]] = {
        "added mask, default": lambda: attend(query, key, value, bias),
        "added mask of one row, default": lambda: attend(query, key, value, bias[:1]),
        "lower right": lambda: attend(query, key, value, causal_lower_right(queries, keys)),
        "square, default": square,
    }
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"added mask, {backend.name}"] = in_backend(backend, ways["added mask, default"])
        ways[f"square, {backend.name}"] = in_backend(backend, square)
        ways[f"no mask, {backend.name}"] = in_backend(backend, lambda: attend(query, key, value))
    return ways


def in_backend(backend: SDPBackend, compute: Callable[[], Any]) -> Callable[[], Any]:
    """Return the same computation by one of PyTorch's kernels."""

    def run() -> Any:
        with sdpa_kernel(backend):
            return compute()

    return run


def microseconds(compute: Callable[[], Any], device: torch.device) -> tuple[float | None, float | None]:
    """Return the times of the first call and of a later one, None where it is not possible."""
    synchronize(device)
    start = time.perf_counter()
    try:
        compute()
    except RuntimeError:
        return None, None
    synchronize(device)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(20):
        compute()
    synchronize(device)
    return first * 1e6, (time.perf_counter() - start) / 20 * 1e6


def measure_grouped(bench: Bench) -> Iterator[dict[str, Any]]:
    """Questions in file order by picture."""
    questions = bench.questions(bench.options.images)
    warm = bench.answer(bench.questions(max(1, bench.options.images // 4)), ANSWER_TOKENS)
    print(f"warmed up in {warm:.1f} s, compiling included", flush=True)
    yield speed_row(bench, "grouped", "ours, 4.24 questions per picture", questions, ANSWER_TOKENS)


def measure_shuffled(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same questions in random order."""
    questions = bench.questions(bench.options.images)
    random.Random(0).shuffle(questions)
    yield speed_row(bench, "shuffled", "ours, the same shuffled", questions, ANSWER_TOKENS)


def measure_single(bench: Bench) -> Iterator[dict[str, Any]]:
    """One question per picture."""
    questions = bench.single_questions(max(1, bench.options.images * 2 // 3))
    bench.answer(questions[: len(questions) // 8 + 1], ANSWER_TOKENS)
    yield speed_row(bench, "single", "ours, one question per picture", questions, ANSWER_TOKENS)


def measure_captions(bench: Bench) -> Iterator[dict[str, Any]]:
    """Long answers."""
    for count in bench.options.captions:
        count = min(count, bench.options.images)
        questions = bench.captions(count)
        bench.answer(questions, 8)
        yield speed_row(bench, "captions", f"ours, {count} captions", questions, CAPTION_TOKENS)


def speed_row(bench: Bench, part: str, case: str, questions: Sequence[Question], new_tokens: int) -> dict[str, Any]:
    """Measure one run of ours."""
    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.answer(questions, new_tokens)
    n_images = len({question.images for question in questions})
    return {
        "part": part,
        "case": case,
        "questions_per_second": len(questions) / seconds,
        "tokens_per_second": len(questions) * new_tokens / seconds,
        "seconds": seconds,
        "tflops": needed_flops(bench.config, questions, n_images, bench.session) / seconds / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
    }


def needed_flops(config: LlavaConfig, questions: Sequence[Question], n_images: int, session: Session) -> float:
    """Return the operations of linear layers on prefixes once per picture and on questions, answers left out."""
    wide, inner = config.hidden_size, config.intermediate_size
    linear = 2 * config.num_hidden_layers * (4 * wide * wide + 3 * wide * inner)
    tower = session.model.get_vision_tower()
    tower_linear = 2 * sum(part.numel() for part in tower.parameters()) * (tower.num_patches + 1)
    prefix = len(session.prompt_ids("?", 1)) - 6
    ids = sum(len(session.prompt_ids(question.text, 1)) - prefix for question in questions)
    return linear * (n_images * (tower.num_patches + prefix) + ids) + n_images * tower_linear


@torch.no_grad()
def measure_agreement(bench: Bench) -> Iterator[dict[str, Any]]:
    """How often answers equal those of `generate` asked one at a time, and how far the first logits are apart."""
    session, count = bench.session, bench.options.compared
    questions = bench.questions(bench.options.images)[:count]
    names = [question.images for question in questions]
    reader = picture_reader(bench)
    pixels = [reader.read(row) for row in names]
    greedy = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    greedy |= {"return_dict_in_generate": True, "output_logits": True}
    texts, logits = {}, {}
    for question, row in zip(questions, pixels, strict=True):
        ids = torch.tensor([session.prompt_ids(question.text, 1)], device=bench.device)
        output = session.model.generate(ids, images=row, attention_mask=torch.ones_like(ids), **greedy)
        texts[question.question_id] = session.decode(output.sequences[0].tolist())
        logits[question.question_id] = output.logits[0][0].float()
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    options = {"compile_mode": bench.compile_mode, "workers": 0}
    ours = {
        row.question.question_id: row for row in answer_batch(session, questions, bench.folder, sampling, **options)
    }
    together = first_logits(bench, questions, reader)
    apart = torch.stack([(together[key] - logits[key]).abs().max() for key in logits])
    spread = torch.stack([row.std() for row in logits.values()]).mean().item()
    first = sum(bool(together[key].argmax() == logits[key].argmax()) for key in logits)
    gaps = torch.stack([row.topk(2).values.diff().abs()[0] for row in logits.values()])
    yield {
        "part": "agreement",
        "case": f"ours in a batch against generate one at a time, {count} questions",
        "same_answers": sum(ours[key].text == texts[key] for key in texts) / count,
        "same_first_token": first / count,
        "logit_difference_median_of_largest": apart.median().item(),
        "logit_difference_largest": apart.max().item(),
        "logit_standard_deviation": spread,
        "gap_of_the_two_likeliest_median": gaps.median().item(),
    }


def first_logits(bench: Bench, questions: Sequence[Question], reader: PictureReader) -> dict[int, torch.Tensor]:
    """Return the logits of each question's first token, computed in groups."""
    session = bench.session
    asks = [Ask(key, session.prompt_ids(question.text, 1), question.images) for key, question in enumerate(questions)]
    plan = plan_groups(asks, session.model.get_vision_tower().num_patches)
    pictures = read_pictures(reader, [group.images for group in plan.groups], workers=0)
    backlog = Backlog(session, len(plan.stem_ids), plan.groups, pictures, room=0, is_padded=False)
    rows = []
    while backlog and backlog.peek():
        rows.append(backlog.take())
    length = round_up(len(plan.stem_ids) + max(row.trunk_length for row in rows) + max(row.length for row in rows))
    cache = TreeCache(FlatLlama(session.model), plan.stem_ids, len(rows), length)
    logits = cache.prefill(rows).float()
    branches = [branch for row in rows for branch in row.group.branches]
    return {questions[branch.ask.key].question_id: row for branch, row in zip(branches, logits, strict=True)}


def picture_reader(bench: Bench) -> PictureReader:
    """Return what turns our pictures into pixels."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    return PictureReader(bench.folder, bench.session.image_processor, SimpleNamespace(image_aspect_ratio="pad"), dtype)


@torch.no_grad()
def measure_transformers(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same questions through `LlavaForConditionalGeneration`, left-padded, pictures decoded ahead as for ours."""
    session, options = bench.session, bench.options
    questions = bench.questions(options.peer_images)
    prompts = [session.prompt_ids(question.text, 1) for question in questions]
    reader = picture_reader(bench)
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
        generate_peer(model, rows[:size], [reader.read(question.images) for question in questions[:size]])
        synchronize(bench.device)
        start = time.perf_counter()
        pictures = read_pictures(reader, [question.images for question in questions], workers=workers)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            generate_peer(model, batch, [next(pictures) for _ in batch])
        synchronize(bench.device)
        seconds = time.perf_counter() - start
        rate = len(rows) / seconds
        case = f"transformers, batch {size}"
        yield {"part": "transformers", "case": case, "questions_per_second": rate, "seconds": seconds}


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


def generate_peer(model: torch.nn.Module, rows: Sequence[list[int]], pictures: Sequence[Any]) -> None:
    """Generate three tokens for each row of ids."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    device = model.device
    pixels = torch.stack([picture[0] for picture in pictures]).to(device)
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
        "4.24 questions per picture": (in_order, ANSWER_TOKENS),
        "the same shuffled": (shuffled, ANSWER_TOKENS),
        "one question per picture": (bench.single_questions(max(1, images * 2 // 3)), ANSWER_TOKENS),
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
        pictures = [bench.folder / question.images[0] for question in questions]
        warm = max(1, len(questions) // 16)
        peer.answer(prompts[case][-warm:], pictures[-warm:], new_tokens)
        seconds = peer.answer(prompts[case], pictures, new_tokens)
        yield {
            "part": "vllm",
            "case": f"vLLM, {case}",
            "questions_per_second": len(questions) / seconds,
            "tokens_per_second": len(questions) * new_tokens / seconds,
            "seconds": seconds,
        }
    peer.close()


def print_profile(bench: Bench) -> Iterator[dict[str, Any]]:
    """For how much of a run the device works, before what it waits, and the kernels that take longest."""
    count = bench.options.images
    cases = {
        "grouped": (bench.questions(count), ANSWER_TOKENS),
        "single": (bench.single_questions(count), ANSWER_TOKENS),
        "captions": (bench.captions(min(count, 64)), 48),
    }
    is_cuda = bench.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU]
    key = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    for case, (questions, tokens) in cases.items():
        bench.answer(questions, tokens)
        with torch.profiler.profile(activities=kinds) as profiler:
            seconds = bench.answer(questions, tokens)
            synchronize(bench.device)
        share = device_share(device_spans(profiler))
        print(f"profile: {case}, {len(questions)} answers of {tokens} tokens", flush=True)
        if is_cuda:
            print(as_lines(share, seconds), flush=True)
        print(profiler.key_averages().table(sort_by=key, row_limit=24, max_name_column_width=60), flush=True)
        yield {
            "part": "profile",
            "case": f"ours, {len(questions)} answers of {tokens} tokens, {case}, profiled",
            "seconds": seconds,
            "device_busy_share": share.busy / seconds if is_cuda else None,
            "seconds_before_the_device_works": share.first,
        }


def synchronize(device: torch.device) -> None:
    """Wait for the work given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> str:
    """Return device and versions in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in ("torch", "transformers"))
    return f"{name}, {versions}"


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return speeds in Markdown."""
    columns = {"case": "", "questions_per_second": "questions/s", "tokens_per_second": "tokens/s", "tflops": "TFLOP/s"}
    lines = [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        if not row.keys() & columns.keys() - {"case"}:
            continue
        cells = [row.get(key, "") for key in columns]
        lines.append(f"| {' | '.join(f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


MEASURES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "ceiling": measure_ceiling,
    "attention": measure_attention,
    "grouped": measure_grouped,
    "shuffled": measure_shuffled,
    "single": measure_single,
    "captions": measure_captions,
    "profile": print_profile,
    "agreement": measure_agreement,
    "transformers": measure_transformers,
    "vllm": measure_vllm,
}


if __name__ == "__main__":
    sys.exit(main())
