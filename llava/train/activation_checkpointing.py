"""Activation checkpointing of as few LLM layers as memory allows."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.model import memory
from llava.model.devices import free_memory
from llava.model.memory import ModelSizes
from llava.model.packed.forward import PackedLlavaForCausalLM
from llava.model.planner.estimate import USABLE_SHARE
from llava.train.flags.arguments import is_offloaded, zero_stage
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.packing_setup import inner_llava

logger = logging.getLogger(__name__)


class FewestCheckpoints(TrainerCallback):
    """Trainer callback: turn activation checkpointing off again for the layers whose activations fit in memory.

    Args:
        model: the trained model.
        rank: of the adapters, 0 without.
        positions: of the largest batch, padding included.
    """

    def __init__(self, model: nn.Module, *, rank: int, positions: int) -> None:
        self.model, self.rank, self.positions = model, rank, positions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers: the first ones stay checkpointed, since the backward pass reaches them last."""
        llava = inner_llava(self.model)
        layers = llava.model.layers
        if not args.checkpoints_activations or args.checkpoint_layers == "all":
            return
        count = len(layers)
        if args.checkpoint_layers != "auto":
            count = int(args.checkpoint_layers)
        elif args.device.type == "cuda" and args.share_image_prefix and args.bits == 16:
            count = self._fewest(llava, args)
        for layer in layers[count:]:
            layer.gradient_checkpointing = False
        logger.info("activation checkpointing: %d of %d layers are recomputed", min(count, len(layers)), len(layers))

    def _fewest(self, llava: PackedLlavaForCausalLM, args: TrainingArguments) -> int:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        reserved = memory.optimizer_bytes(  # allocated in the first step
            trained, zero=zero_stage(args.deepspeed), gpus=args.world_size, offload=is_offloaded(args.deepspeed)
        )
        sizes = ModelSizes.of(llava.config)
        images = -(-self.positions // sizes.patches)  # nearly all positions are patches
        peak = functools.partial(
            memory.training_peak,
            sizes,
            memory.StepLoad(self.positions, images, predicted=0),
            rank=self.rank,
            dropout=args.lora_dropout if self.rank else 0.0,
            is_fused=llava.fused_lora is not None and llava.fused_lora.compiled,
        )
        return memory.fewest_checkpointed(
            lambda count: reserved + peak(checkpointed=count), sizes.layers, USABLE_SHARE * free_memory(args.device)
        )
