"""Training and exam of playground/llava-tiny: model, batches of packed rows, loss, the table, the directory written."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus, Slots, build_corpus, encode_question, make_tokenizer, packed_layout
from questions import NEW_KINDS, OLD_KINDS, Question
from scenes import CANVAS
from tokenizer import VOCABULARY, train_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.clip_image_processor import CLIP_MEAN, CLIP_STD, CLIPPixels
from llava.constants import DEFAULT_TEMPLATE
from llava.files.atomic_files import atomic_directory
from llava.model.builder import build_model
from llava.model.checkpoint.checkpoint import open_checkpoint, save_checkpoint, state_for_file
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": CANVAS,
    "patch_size": 14,
    "projection_dim": 128,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLM = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
TRAINING_SLOTS = Slots(
    kinds=("color", "shape", "size", "place", "place", "exists", "exists", "exists", "attribute", "attribute")
    + ("both",) * 3 + ("which",) * 3 + ("share", "names", "say", "caption"),
    lengths=(20,) * 10 + (28,) * 3 + (24,) * 3 + (20, 24, 16, 48),
)  # fmt: skip
EXAM_SLOTS = Slots(OLD_KINDS + NEW_KINDS, (32,) * len(OLD_KINDS + NEW_KINDS))
TRAINING_SEED, EXAM_SEED = 1, 2  # of the scenes

README = """---
license: apache-2.0
---
# llava-tiny

A small but complete LLaVA in the released LLaVA-1.5 layout: CLIP vision tower (patch 14 at 84 pixels, 36 patches of the
last layer but one), `mlp2x_gelu` projector, five Llama layers, its own sentencepiece tokenizer with byte fallback;
{parameters:.1f} million parameters in use, stored in fp16, template `vicuna_v1`. It exists so that every program of
this repository runs and is tested without a GPU or a download. It knows scenes of coloured shapes and nothing else.

Made from scratch in this repository, from images drawn by `examples/shapes_world/scenes.py`; no other weights or data
went in.
Licence: Apache-2.0.

Trained by `python examples/shapes_world/train_base.py {command}`.
Right answers on {exam_scenes} unseen scenes, one question of each kind per scene where it allows one, exact match under
greedy decoding (`python examples/shapes_world/train_base.py --exam_only`):

{table}

The new kinds are the task that `scripts/quickstart.sh` teaches by LoRA; the base never met them. Besides the old kinds
the base heard captions (`caption`, `names`, `share` and `say` in `examples/shapes_world/known_questions.py`), which
nobody is scored on.
"""


def train_directory(arguments: argparse.Namespace) -> None:
    """Train, examine, write the directory."""
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = Path(folder) / "tokenizer.model"
        tokenizer_file.write_bytes(train_tokenizer())
        print(f"drawing {arguments.scenes} + {arguments.exam_scenes} scenes", flush=True)
        corpus = build_corpus(TRAINING_SEED, arguments.scenes, TRAINING_SLOTS, tokenizer_file, arguments.processes)
        exam = build_corpus(EXAM_SEED, arguments.exam_scenes, EXAM_SLOTS, tokenizer_file, arguments.processes)
        tokenizer = make_tokenizer(tokenizer_file)
        prefix = torch.tensor(encode_question(Question("", "?", "?"), tokenizer)[0], device=device)
        torch.manual_seed(arguments.seed)
        model = new_model().to(device)
        train(model, corpus, prefix, arguments)
        table = format_table(examine(model, exam, prefix))
        print(table)
        write_model(model, tokenizer_file, arguments, table)


def examine_directory(arguments: argparse.Namespace) -> str:
    """The table of a model that was written before."""
    tokenizer_file = arguments.output / "tokenizer.model"
    exam = build_corpus(EXAM_SEED, arguments.exam_scenes, EXAM_SLOTS, tokenizer_file, arguments.processes)
    prefix = encode_question(Question("", "?", "?"), make_tokenizer(tokenizer_file))[0]
    device = choose_device(arguments.device)
    model = build_model(open_checkpoint(arguments.output), dtype="float32", device=device)
    return format_table(examine(model.eval(), exam, torch.tensor(prefix, device=device)))


def choose_device(name: str | None) -> torch.device:
    """Return the device asked for, else CUDA where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def new_model() -> LlavaLlamaForCausalLM:
    """The model with random weights: LLaVA-1.5's classes at small sizes."""
    config = LlavaConfig(
        **LLM,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        mm_vision_config=VISION,
        mm_hidden_size=VISION["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
        tokenizer_model_max_length=2048,
        conversation_template=DEFAULT_TEMPLATE,
        use_mm_proj=True,
    )
    model = LlavaLlamaForCausalLM(config)
    tower = model.get_vision_tower()
    # Released checkpoints hold the whole encoder; its last layer is never run, and here it stays random.
    whole = CLIPVisionModel(CLIPVisionConfig(**VISION)).state_dict()
    last = f"encoder.layers.{VISION['num_hidden_layers'] - 1}."
    tower.unused_tensors = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in whole.items()
        if last in name
    }
    return model


def train(model: LlavaLlamaForCausalLM, corpus: Corpus, prefix: Tensor, arguments: argparse.Namespace) -> None:
    """Train all weights on the packed rows; on CUDA in bf16 autocast and compiled."""
    device = prefix.device
    pixels, input_ids = (torch.from_numpy(array).to(device) for array in (corpus.pixels, corpus.input_ids))
    supervised = torch.from_numpy(corpus.supervised)  # stays on the CPU: asking the GPU where it is true would wait
    mask, position_ids = packed_layout(len(prefix), model.get_vision_tower().num_patches, corpus.slots)
    layout = mask.to(device), position_ids.to(device)
    body = torch.compile(model.model) if device.type == "cuda" else model.model
    if device.type == "cuda":
        model.get_vision_tower().compile()
    optimizer = build_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, arguments.steps))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = arguments.learning_rate
    scheduler.base_lrs = [arguments.learning_rate] * len(optimizer.param_groups)
    start = time.monotonic()
    for step, rows in enumerate(draw_batches(len(pixels), arguments.batch_size, arguments.steps, arguments.seed)):
        targets = find_targets(supervised[rows]).to(device, non_blocking=True)
        rows = rows.to(device, non_blocking=True)
        ids = input_ids[rows].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = run_packed(model, body, jitter(normalize(pixels[rows])), ids, prefix, layout)
            loss = answer_loss(model, hidden, ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 250 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay on norms, biases and embeddings: words that never come up must keep their vectors."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim < 2 or "embed" in name or "lm_head" in name
        (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def learning_rate_scale(step: int, steps: int) -> float:
    """Warm-up over 300 steps, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / 300) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def draw_batches(rows: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random row numbers, (batch_size,) per step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(rows, (batch_size,), generator=generator)


def normalize(pixels: Tensor) -> Tensor:
    """Bytes (N, H, W, 3) to what the vision tower expects, (N, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def jitter(images: Tensor) -> Tensor:
    """Jitter brightness and contrast, differently for each image."""
    gain, offset = (0.1 * torch.randn(len(images), 1, 1, 1, device=images.device) for _ in range(2))
    return images * (1 + gain) + offset


def run_packed(
    model: LlavaLlamaForCausalLM,
    body: nn.Module,
    images: Tensor,
    input_ids: Tensor,
    prefix: Tensor,
    layout: tuple[Tensor, Tensor],
) -> Tensor:
    """Hidden states of the slots of packed rows, (B, sum of lengths, D).

    Args:
        model: gives the embeddings and the image features.
        body: its Llama body, compiled or not.
        images: (B, 3, H, W).
        input_ids: (B, sum of lengths).
        prefix: (T,) ids before the image.
        layout: of `packed_layout`.
    """
    embed, rows = model.get_input_embeddings(), len(images)
    features = model.encode_images(images)  # (B, P, D)
    parts = [embed(prefix).expand(rows, -1, -1), features, embed(input_ids)]
    embeds = torch.cat([part.to(features.dtype) for part in parts], dim=1)  # (B, S, D)
    mask, position_ids = layout
    output = body(
        inputs_embeds=embeds,
        attention_mask=mask.expand(rows, -1, -1, -1),
        position_ids=position_ids.expand(rows, -1),
        use_cache=False,
    )
    return output.last_hidden_state[:, -input_ids.shape[1] :]


def find_targets(supervised: Tensor) -> Tensor:
    """Places of the tokens to predict, counted along the flattened (B, S); a row's first token is never one."""
    return supervised.flatten().nonzero().squeeze(1)


def answer_loss(model: LlavaLlamaForCausalLM, hidden: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the tokens at `targets`, each predicted from the token before it."""
    logits = model.lm_head(hidden.flatten(0, 1)[targets - 1])  # (number of targets, vocabulary)
    return functional.cross_entropy(logits.float(), input_ids.flatten()[targets])


@torch.no_grad()
def examine(model: LlavaLlamaForCausalLM, exam: Corpus, prefix: Tensor, batch_size: int = 100) -> dict[str, float]:
    """Share of questions answered exactly, per kind.

    An answer counts where every one of its tokens, `</s>` included, is the most likely one after the tokens before it:
    exactly then greedy decoding gives it.
    """
    device = prefix.device
    mask, position_ids = packed_layout(len(prefix), model.get_vision_tower().num_patches, exam.slots)
    layout = mask.to(device), position_ids.to(device)
    borders = np.cumsum((0, *exam.slots.lengths))
    hits: dict[str, list[bool]] = {kind: [] for kind in exam.slots.kinds}
    for start in range(0, len(exam.pixels), batch_size):
        rows = slice(start, start + batch_size)
        input_ids = torch.from_numpy(exam.input_ids[rows]).long().to(device)
        images = normalize(torch.from_numpy(exam.pixels[rows]).to(device))
        hidden = run_packed(model, model.model, images, input_ids, prefix, layout)
        right = (model.lm_head(hidden[:, :-1]).argmax(-1) == input_ids[:, 1:]).cpu().numpy()
        supervised = exam.supervised[rows][:, 1:]
        for kind, low, high in zip(exam.slots.kinds, borders, borders[1:], strict=False):
            asked = supervised[:, low : high - 1]
            good = (right[:, low : high - 1] | ~asked).all(axis=1)
            hits[kind] += good[asked.any(axis=1)].tolist()
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


def format_table(accuracy: dict[str, float]) -> str:
    """The share of right answers on unseen scenes, old kinds first, as a Markdown table."""
    lines = ["| kind of question | right on unseen scenes |", "| --- | --- |"]
    for kind, share in accuracy.items():
        lines.append(f"| {kind}{'' if kind in OLD_KINDS else ' (new)'} | {100 * share:.1f} % |")
    return "\n".join(lines)


def write_model(model: LlavaLlamaForCausalLM, tokenizer_file: Path, arguments: argparse.Namespace, table: str) -> None:
    """Write the directory in fp16 with a README; the model that was there before is replaced at the end."""
    output = arguments.output
    tensors = state_for_file(model, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
    tokenizer, processor = make_tokenizer(tokenizer_file), CLIPPixels(size=CANVAS)
    command = f"--scenes {arguments.scenes} --steps {arguments.steps} --batch_size {arguments.batch_size}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = README.format(parameters=parameters / 1e6, command=command, table=table, exam_scenes=arguments.exam_scenes)
    with atomic_directory(output, replace=True) as directory:
        save_checkpoint(tensors, model.config, tokenizer, processor, directory, dtype=torch.float16)
        (directory / "README.md").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"wrote {output}: {size / 1e6:.2f} MB, {parameters} parameters in use")
