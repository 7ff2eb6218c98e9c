"""How many layers are computed again in the backward pass: as few as memory allows."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.model import memory
from llava.model.devices import free_memory
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.memory import ModelSizes
from llava.train.arguments import TrainingArguments, is_offloaded, zero_stage

logger = logging.getLogger(__name__)

USABLE = 0.92
"""Of the free memory; the rest is lost between allocations."""


def layers_to_recompute(sizes: ModelSizes, *, positions: int, block: int, reserved: int, available: int) -> int:
    """Return the fewest layers that must be computed again so that a step over packs fits; all of them if none fits.

    Args:
        sizes: of the model.
        positions: of the largest step.
        block: bytes that a layer keeps for each of them.
        reserved: bytes of gradients and optimizer, which come with the first step.
        available: bytes free before it.
    """
    stream = memory.HALF * sizes.hidden
    ends = 2 * stream + memory.SINGLE * sizes.hidden + memory.backward_workspace(sizes)
    ends += memory.HALF * (sizes.tower_hidden + 2 * sizes.hidden)  # the projector's, nearly all being images' positions
    for count in range(sizes.layers):
        kept = count * stream + (sizes.layers - count) * block + (block if count else 0)
        if reserved + positions * (kept + ends) <= USABLE * available:
            return count
    return sizes.layers


class KeepActivations(TrainerCallback):
    """Takes checkpointing back from the layers that need not be computed again, once the trainer has set it.

    Args:
        model: whose layers run.
        rank: of the adapters, 0 without.
        positions: of the largest step.
    """

    def __init__(self, model: nn.Module, *, rank: int, positions: int) -> None:
        self.model, self.rank, self.positions = model, rank, positions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers: the first ones are computed again, as their turn comes last."""
        llava = next(module for module in self.model.modules() if isinstance(module, LlavaLlamaForCausalLM))
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
        logger.info("%d of %d layers are computed again in the backward pass", min(count, len(layers)), len(layers))

    def _fewest(self, llava: LlavaLlamaForCausalLM, args: TrainingArguments) -> int:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        stage = zero_stage(args.deepspeed)
        reserved = memory.optimizer_bytes(
            trained, zero=stage, gpus=args.world_size, offload=is_offloaded(args.deepspeed)
        )
        sizes = ModelSizes.of(llava.config)
        return layers_to_recompute(
            sizes,
            positions=self.positions,
            block=self._block(llava, sizes, args.lora_dropout if self.rank else 0.0),
            reserved=reserved,
            available=free_memory(args.device),
        )

    def _block(self, llava: LlavaLlamaForCausalLM, sizes: ModelSizes, dropout: float) -> int:
        """Return the bytes that a layer keeps for a position; compiled ones alone need at most what is counted here."""
        if llava.fused_layers is not None and llava.fused_layers.compiled:
            return memory.fused_activations(sizes, rank=self.rank, dropout=dropout)
        return memory.layer_activations(sizes, length=0, rank=self.rank, dropout=dropout, is_padded=False)
