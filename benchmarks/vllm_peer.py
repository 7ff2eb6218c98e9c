"""vLLM on the weights and questions of a benchmark: export in the llava-hf layout, prompts, speed."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.chat_template import chat_template
from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.batch.questions import Question
from llava.inference.session import Session
from llava.model.checkpoint.checkpoint import Checkpoint, Layout
from llava.model.checkpoint.convert import special_rows, write_hf
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors
from llava.model.vision_tower import TOWER_PREFIX, released_name


def export_hf(session: Session, directory: Path) -> None:
    """Write the model of a session as llava-hf directories are laid out.

    Args:
        session: with whole weights in 16 or 32 bit.
        directory: exists and is empty.
    """
    config = session.model.config
    tensors = {released_name(name): parameter.detach() for name, parameter in session.model.named_parameters()}
    # The last layer of the vision tower is unused: the model lacks it, files have it.
    layers = f"{TOWER_PREFIX}vision_model.encoder.layers."
    last = config.mm_vision_config["num_hidden_layers"] - 1
    first = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{layers}0.")}
    for name, tensor in first.items():
        tensors.setdefault(name.replace(f"{layers}0.", f"{layers}{last}."), tensor)
    entries = {
        name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(tensor.cpu)) for name, tensor in tensors.items()
    }
    checkpoint = Checkpoint(
        config, LazyTensors(entries), session.tokenizer, session.image_processor, Layout.FULL, directory, None
    )
    write_hf(checkpoint, directory, None, chat_template(session.template))


def make_prompts(session: Session, questions: Sequence[Question]) -> list[list[int]]:
    """Return the ids of each question with one image token for each image, as vLLM wants them."""
    image_id, _ = special_rows(session.tokenizer)
    prompts = (session.prompt_ids(question.text, len(question.images)) for question in questions)
    return [[image_id if token == IMAGE_TOKEN_INDEX else token for token in ids] for ids in prompts]


class Peer:
    """vLLM with a model.

    Args:
        library: the module `vllm`.
        directory: in the llava-hf layout.
        longest: tokens of prompt, image and answer together.
        memory_share: of the GPU that it may take.
    """

    def __init__(self, library: Any, directory: Path, longest: int, memory_share: float = 0.9) -> None:
        self._library = library
        self._llm = library.LLM(
            model=str(directory),
            max_model_len=longest,
            enable_prefix_caching=True,
            limit_mm_per_prompt={"image": 1},
            gpu_memory_utilization=memory_share,
        )

    def answer(self, prompts: Sequence[list[int]], images: Sequence[Path], new_tokens: int) -> float:
        """Answer each prompt about its image with `new_tokens` tokens; return the seconds from files to answers."""
        start = time.perf_counter()
        opened = {path: Image.open(path).convert("RGB") for path in dict.fromkeys(images)}
        asked = [
            {"prompt_token_ids": prompt, "multi_modal_data": {"image": opened[path]}}
            for prompt, path in zip(prompts, images, strict=True)
        ]
        choice = self._library.SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True
        )
        outputs = self._llm.generate(asked, choice, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if len(outputs) != len(prompts) or lengths != {new_tokens}:
            raise RuntimeError(f"vLLM gave {len(outputs)} answers of {sorted(lengths)} tokens; {new_tokens} were asked")
        return seconds

    def close(self) -> None:
        """Free the memory."""
        self._llm = None
        torch.cuda.empty_cache()
