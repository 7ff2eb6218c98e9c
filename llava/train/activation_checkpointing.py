"""Activation checkpointing of as few LLM layers as memory allows."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.model import memory
from llava.model.devices import free_memory
from llava.model.memory import ModelSizes
from llava.model.packed.forward import PackedLlavaForCausalLM
from llava.train.flags.arguments import is_offloaded, zero_stage
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.packing_setup import inner_llava

logger = logging.getLogger(__name__)

USABLE_SHARE = 0.92  # of the free memory; fragmentation takes the rest


def layers_to_checkpoint(sizes: ModelSizes, *, positions: int, block: int, reserved: int, available: int) -> int:
    """Return the fewest layers to checkpoint so that a step over packs fits in memory; all if no number fits.

    Args:
        sizes: of the model.
        positions: of the largest batch, padding included.
        block: bytes of activations that a layer keeps per position.
        reserved: bytes of gradients and optimizer state, allocated in the first step.
        available: bytes free before the first step.
    """
    stream = memory.HALF * sizes.hidden
    ends = 2 * stream + memory.SINGLE * sizes.hidden + memory.backward_workspace(sizes)
    ends += memory.HALF * (sizes.tower_hidden + 2 * sizes.hidden)  # projector; nearly all are patches
    for count in range(sizes.layers):
        kept = count * stream + (sizes.layers - count) * block + (block if count else 0)
        if reserved + positions * (kept + ends) <= USABLE_SHARE * available:
            return count
    return sizes.layers


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
        stage = zero_stage(args.deepspeed)
        reserved = memory.optimizer_bytes(
            trained, zero=stage, gpus=args.world_size, offload=is_offloaded(args.deepspeed)
        )
        sizes = ModelSizes.of(llava.config)
        return layers_to_checkpoint(
            sizes,
            positions=self.positions,
            block=self._block(llava, sizes, args.lora_dropout if self.rank else 0.0),
            reserved=reserved,
            available=free_memory(args.device),
        )

    def _block(self, llava: PackedLlavaForCausalLM, sizes: ModelSizes, dropout: float) -> int:
        """Return the bytes of activations that a layer keeps per position; an upper bound for compiled layers."""
        if llava.fused_lora is not None and llava.fused_lora.compiled:
            return memory.fused_activations(sizes, rank=self.rank, dropout=dropout)
        return memory.layer_activations(sizes, length=0, rank=self.rank, dropout=dropout, is_padded=False)
