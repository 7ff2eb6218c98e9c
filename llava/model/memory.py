"""GPU memory of training and inference, counted from a model's sizes: weights, optimizer, activations, KV cache.

Results are bytes per GPU. A "position" is a token or an image patch of a row. The counts follow transformers' Llama,
peft's LoRA and PyTorch's fused attention: comments name the tensors that autograd saves or that are live at the peak.
`tests/model/test_memory.py` compares them with what autograd saves, `tests/model/planner/test_measured_peaks.py` with
peaks that were measured on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from llava.constants import FP8

if TYPE_CHECKING:
    from llava.model.configuration import LlavaConfig

HALF, SINGLE = 2, 4
"""Bytes of a 16-bit and of a 32-bit number."""
_NF4_BLOCK, _NF4_NESTED_BLOCK = 64, 256
GATHERED_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 gathers at a time: `stage3_max_live_parameters` of `scripts/zero3.json`."""
LINEARS = 7
"""Linear layers of an LLM layer: q, k, v, o, gate, up, down."""


class StepLoad(NamedTuple):
    """Size of the largest micro-batch.

    Attributes:
        positions: of the LLM, padding included.
        images: that the vision tower encodes.
        predicted: positions whose logits are computed.
        masked_length: length of rows whose attention takes a dense mask, in positions; 0 = attention without one.
    """

    positions: int
    images: int
    predicted: int
    masked_length: int = 0


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model on which its memory depends.

    Attributes:
        layers: of the LLM.
        hidden: D.
        intermediate: inner width of the LLM's MLP.
        key_value: Hkv x d.
        heads: H.
        vocabulary: W.
        tower_layers: layers of the vision tower that run.
        tower_hidden: V.
        tower_intermediate: inner width of the vision tower's MLP.
        patches: P.
        patch_values: numbers in a patch, 3 colours included.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    heads: int
    vocabulary: int
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    patches: int
    patch_values: int

    @classmethod
    def of(cls, config: LlavaConfig) -> ModelSizes:
        """Return the sizes of a config.

        Raises:
            ValueError: if the model has no vision tower.
        """
        vision = config.mm_vision_config
        if vision is None:
            raise ValueError("the model has no vision tower, so its memory can't be planned; pass --vision-tower")
        depth = config.mm_vision_select_layer
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            key_value=config.hidden_size * config.num_key_value_heads // config.num_attention_heads,
            heads=config.num_attention_heads,
            vocabulary=config.vocab_size,
            tower_layers=depth if depth >= 0 else vision["num_hidden_layers"] + 1 + depth,
            tower_hidden=vision["hidden_size"],
            tower_intermediate=vision["intermediate_size"],
            patches=(vision["image_size"] // vision["patch_size"]) ** 2,
            patch_values=3 * vision["patch_size"] ** 2,
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of an LLM layer."""
        wide, narrow = self.hidden, self.key_value
        attention = [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide)]
        return [*attention, (self.intermediate, wide), (self.intermediate, wide), (wide, self.intermediate)]

    @property
    def block_weights(self) -> int:
        """Numbers in the linear layers of all LLM layers."""
        return self.layers * sum(out * into for out, into in self.linear_shapes)

    @property
    def llm_parameters(self) -> int:
        """Parameters of the LLM: layers with their norms, last norm, embedding, head."""
        return self.block_weights + (2 * self.layers + 1) * self.hidden + 2 * self.vocabulary * self.hidden

    @property
    def projector_parameters(self) -> int:
        """Parameters of a two-layer MLP with biases."""
        return (self.tower_hidden + 1) * self.hidden + (self.hidden + 1) * self.hidden

    @property
    def tower_parameters(self) -> int:
        """Parameters of the vision tower's layers that run, its embeddings and both outer norms."""
        wide, inner = self.tower_hidden, self.tower_intermediate
        layer = 4 * (wide + 1) * wide + (wide + 1) * inner + (inner + 1) * wide + 4 * wide
        return self.tower_layers * layer + wide * (self.patch_values + self.patches + 1 + 1) + 4 * wide

    def lora_parameters(self, rank: int) -> int:
        """Return the parameters of adapters of this rank on every linear layer of the LLM's layers."""
        return self.layers * rank * sum(out + into for out, into in self.linear_shapes)


def weight_bytes(sizes: ModelSizes, bits: int | str) -> int:
    """Return the size of the weights with the LLM layers' linear layers in 16, 8 or 4 bit or FP8, all else in 16."""
    others = sizes.llm_parameters - sizes.block_weights + sizes.projector_parameters + sizes.tower_parameters
    count = sizes.block_weights
    if bits == 16:
        return HALF * (count + others)
    if bits in (8, FP8):  # and a scale for each row
        rows = sizes.layers * sum(out for out, _ in sizes.linear_shapes)
        return count + SINGLE * rows + HALF * others
    blocks = count // _NF4_BLOCK  # a scale of 8 bit for each, and a scale of scales
    return count // 2 + blocks + SINGLE * math.ceil(blocks / _NF4_NESTED_BLOCK) + HALF * others


def layer_activations(
    sizes: ModelSizes,
    *,
    length: int,
    rank: int,
    dropout: float,
    is_padded: bool,
    element: int = HALF,
    mask_element: int = 1,
) -> int:
    """Return the bytes that autograd saves of one LLM layer for one position.

    Args:
        sizes: of the model.
        length: of the rows, in positions.
        rank: of the adapters; 0 = none, and the layer's own weights are trained.
        dropout: 0..1, on the adapters' inputs.
        is_padded: whether rows differ in length, so that attention needs a mask.
        element: bytes of an activation.
        mask_element: bytes that dropout saves per number: 1 on CUDA, `element` on the CPU.
    """
    wide, narrow, inner = sizes.hidden, sizes.key_value, sizes.intermediate
    kept = 2 * SINGLE * (wide + 1)  # both norms: the input in fp32 and a scale
    kept += element * (2 * wide + 2 * narrow) + SINGLE * sizes.heads  # attention: q, k, v, output; log of the sums
    kept += element * 3 * inner  # silu's input, its output, up
    if is_padded:
        kept += element * length  # a row of the mask, as numbers that are added
    inputs = sum(into for _, into in sizes.linear_shapes)
    if rank and dropout:
        kept += (element + mask_element) * inputs  # each adapter's own dropped input and dropout mask
    else:
        kept += element * (2 * wide + inner)  # input of q, k, v; of gate, up; of down. That of o is saved by attention
    if rank:
        kept += element * rank * LINEARS  # A's outputs
    else:
        kept += 2 * element * wide  # trained norms: their output before the weight
    return kept


def fused_activations(
    sizes: ModelSizes, *, rank: int, dropout: float, element: int = HALF, mask_element: int = 1
) -> int:
    """Return `layer_activations` of a layer of `FusedLora`, compiled; arguments as there."""
    wide, narrow, inner = sizes.hidden, sizes.key_value, sizes.intermediate
    kept = element * 2 * wide + 2 * SINGLE  # the residual stream before attention and before the MLP; the norms' scales
    kept += element * (wide + 2 * narrow)  # q, k, v, which are one matrix: v is a view of it
    kept += element * (wide + narrow)  # rotated q and k
    kept += element * wide + SINGLE * sizes.heads  # attention's output; log of the sums
    kept += element * 2 * inner  # gate and up
    if dropout:
        kept += (element + mask_element) * (3 * wide + inner)  # each input once for all adapters; dropout mask
    else:
        kept += element * (2 * wide + inner)  # input of q, k, v; of gate, up; of down. That of o is attention's output
    return kept + element * rank * LINEARS  # A's outputs


def backward_workspace(sizes: ModelSizes) -> int:
    """Return the gradients that are live at one position of an LLM layer, in its MLP, where they are most."""
    # Of the product silu x up: from the base, through the adapter before and after dropout; of the residuals: two.
    return HALF * (3 * sizes.intermediate + 2 * sizes.hidden)


def loss_bytes(sizes: ModelSizes) -> int:
    """Return the bytes of the loss at one position: logits in 16 bit and fp32, their log-softmax, its gradient."""
    return (HALF + 2 * SINGLE + SINGLE) * sizes.vocabulary


def last_layer_activations(sizes: ModelSizes, *, dropout: float) -> int:
    """Return `fused_activations` of the last layer, which computes only keys and values at most positions."""
    wide, narrow = sizes.hidden, sizes.key_value
    kept = HALF * 2 * wide + SINGLE  # the residual stream and its norm
    kept += HALF * 3 * narrow  # keys, rotated keys, values
    return kept + ((HALF + 1) * wide if dropout else 0)


def tower_activations(sizes: ModelSizes, *, checkpointing: bool) -> int:
    """Return the bytes of activations and gradients of a trained vision tower for one image."""
    wide, inner = sizes.tower_hidden, sizes.tower_intermediate
    # Both norms' inputs and outputs; q, k, v, attention's output; the MLP's input to its activation, the sigmoid, both
    # factors of its product, its output.
    block = HALF * (9 * wide + 4 * inner)
    kept = sizes.tower_layers * HALF * wide + block if checkpointing else sizes.tower_layers * block
    return (sizes.patches + 1) * (kept + HALF * (2 * wide + inner))


def training_peak(
    sizes: ModelSizes, load: StepLoad, *, rank: int, dropout: float, is_fused: bool, checkpointed: int
) -> int:
    """Return the peak of activations and their gradients in a step.

    The peak is at the loss, where logits are live, in the backward pass of the last layer, or where the first
    checkpointed layer is computed again, when activations of the layers after it are freed.

    Args:
        sizes: of the model.
        load: of the largest micro-batch.
        rank: of the adapters; 0 = none, and the layers' own weights are trained.
        dropout: 0..1, on the adapters' inputs.
        is_fused: whether the layers are those of a compiled `FusedLora`.
        checkpointed: layers with activation checkpointing, the first ones.
    """
    stream = HALF * sizes.hidden
    if is_fused:
        block = fused_activations(sizes, rank=rank, dropout=dropout)
        layers, last = sizes.layers - 1, last_layer_activations(sizes, dropout=dropout)
    else:
        length = load.masked_length
        block = layer_activations(sizes, length=length, rank=rank, dropout=dropout, is_padded=length > 0)
        layers, last = sizes.layers, 0
    checkpointed = min(checkpointed, layers)
    workspace = backward_workspace(sizes)
    # The spliced row, the last norm's input in fp32 and output; images: the projector's activations.
    ends = load.positions * (2 * stream + SINGLE * sizes.hidden)
    ends += load.images * sizes.patches * HALF * (sizes.tower_hidden + 2 * sizes.hidden)
    kept = load.positions * (checkpointed * stream + (layers - checkpointed) * block + last)
    at_loss = kept + max(load.predicted * loss_bytes(sizes), load.positions * workspace)
    again = load.positions * (checkpointed * stream + block + workspace) if checkpointed else 0
    return ends + max(at_loss, again)


def fewest_checkpointed(peak: Callable[[int], int], layers: int, budget: float) -> int:
    """Return the fewest layers to checkpoint so that `peak` of their number is within the budget; all if none is."""
    return next((count for count in range(layers) if peak(count) <= budget), layers)


def optimizer_bytes(trained: int, *, zero: int, gpus: int, offload: bool) -> int:
    """Return the bytes of AdamW's fp32 weights and moments, the gradients, and the trainable parameters themselves.

    Args:
        trained: number of trainable parameters.
        zero: DeepSpeed's stage, 0 without DeepSpeed.
        gpus: processes.
        offload: DeepSpeed keeps fp32 weights and moments in CPU memory, in stage 3 the parameters too.
    """
    if zero == 0:  # the parameters are the fp32 weights; autocast keeps a 16-bit copy, DDP gradients in buckets
        return trained * (SINGLE + SINGLE + 2 * SINGLE + HALF + (SINGLE if gpus > 1 else 0))
    states = 0 if offload else 3 * SINGLE * trained // gpus
    gradients = HALF * trained // (gpus if zero >= 2 else 1)
    parameters = 0 if zero == 3 and offload else HALF * trained // (gpus if zero == 3 else 1)
    return states + gradients + parameters


def cache_bytes(sizes: ModelSizes, positions: int) -> int:
    """Return the bytes of a 16-bit KV cache of `positions`."""
    return 2 * HALF * sizes.layers * sizes.key_value * positions


def prefill_workspace(sizes: ModelSizes, length: int) -> int:
    """Return the bytes of a prefill at one position besides the KV cache."""
    # The spliced row, the residual stream and its norm; silu's output, up and their product; a row of the mask, twice.
    return HALF * (3 * sizes.hidden + 3 * sizes.intermediate) + (HALF + 1) * length


def largest_matrix(sizes: ModelSizes) -> int:
    """Return the 16-bit size of the largest weight that is dequantised from 4 or 8 bit for its product."""
    return HALF * max(out * into for out, into in sizes.linear_shapes)
