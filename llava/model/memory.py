"""How much GPU memory LLaVA needs, counted from its sizes: weights, what learns, activations, cache.

Results are bytes per GPU. A "position" is a token or an image patch of a row. The counts follow transformers' Llama,
peft's LoRA and PyTorch's fused attention: each comment names the tensors that autograd keeps or that live at the peak.
`tests/model/test_memory.py` compares them with what autograd keeps; `benchmarks/memory_plan.py` with a GPU.
"""

from __future__ import annotations

import dataclasses
import math

from llava.model.configuration import LlavaConfig

HALF, SINGLE = 2, 4
"""Bytes of a 16-bit and of a 32-bit number."""
_NF4_BLOCK, _NF4_NESTED_BLOCK = 64, 256
GATHERED_PARAMETERS = 1_000_000_000
"""What ZeRO-3 holds whole at a time, `stage3_max_live_parameters` of `scripts/zero3.json`."""
LINEARS = 7
"""Linear layers of a block: q, k, v, o, gate, up, down."""


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What memory depends on.

    Attributes:
        layers: blocks of the LLM.
        hidden: D, width of the LLM.
        intermediate: width inside its MLP.
        key_value: width of keys, and of values.
        heads: of attention.
        vocabulary: rows of the embedding.
        tower_layers: of the image encoder, those that run.
        tower_hidden: V, its width.
        tower_intermediate: width inside its MLP.
        patches: P, positions of an image.
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
            ValueError: if the model has no image encoder.
        """
        vision = config.mm_vision_config
        if vision is None:
            raise ValueError("the model has no image encoder, so its memory can't be planned; pass --vision-tower")
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
        """(out, in) of the linear layers of a block."""
        wide, narrow = self.hidden, self.key_value
        attention = [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide)]
        return [*attention, (self.intermediate, wide), (self.intermediate, wide), (wide, self.intermediate)]

    @property
    def block_weights(self) -> int:
        """Numbers in the linear layers of all blocks."""
        return self.layers * sum(out * into for out, into in self.linear_shapes)

    @property
    def llm_parameters(self) -> int:
        """Of the LLM: blocks with their norms, last norm, embedding, head."""
        return self.block_weights + (2 * self.layers + 1) * self.hidden + 2 * self.vocabulary * self.hidden

    @property
    def projector_parameters(self) -> int:
        """Of a two-layer MLP with biases."""
        return (self.tower_hidden + 1) * self.hidden + (self.hidden + 1) * self.hidden

    @property
    def tower_parameters(self) -> int:
        """Of the encoder's layers that run, its embeddings and both outer norms."""
        wide, inner = self.tower_hidden, self.tower_intermediate
        layer = 4 * (wide + 1) * wide + (wide + 1) * inner + (inner + 1) * wide + 4 * wide
        return self.tower_layers * layer + wide * (self.patch_values + self.patches + 1 + 1) + 4 * wide

    def lora_parameters(self, rank: int) -> int:
        """Of adapters of this rank on every linear layer of the blocks."""
        return self.layers * rank * sum(out + into for out, into in self.linear_shapes)


def weight_bytes(sizes: ModelSizes, bits: int) -> int:
    """Return the size of the weights with the blocks' linear layers in 16, 8 or 4 bit and all else in 16."""
    others = sizes.llm_parameters - sizes.block_weights + sizes.projector_parameters + sizes.tower_parameters
    count = sizes.block_weights
    if bits == 16:
        return HALF * (count + others)
    if bits == 8:  # and a scale for each row
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
    """Return what autograd keeps of one block for one position.

    Args:
        sizes: of the model.
        length: of the rows, in positions.
        rank: of the adapters; 0 = none, and the block's own weights learn.
        dropout: 0..1, on the adapters' inputs.
        is_padded: rows of several lengths, so that attention needs a mask.
        element: bytes of an activation.
        mask_element: bytes dropout keeps for each number: 1 on CUDA, `element` on the CPU.
    """
    wide, narrow, inner = sizes.hidden, sizes.key_value, sizes.intermediate
    kept = 2 * SINGLE * (wide + 1)  # both norms: the input in fp32 and a scale
    kept += element * (2 * wide + 2 * narrow) + SINGLE * sizes.heads  # attention: q, k, v, output; log of the sums
    kept += element * 3 * inner  # silu's input, its output, up
    if is_padded:
        kept += element * length  # a row of the mask, as numbers that are added
    inputs = sum(into for _, into in sizes.linear_shapes)
    if rank and dropout:
        kept += (element + mask_element) * inputs  # each adapter's own dropped input, and what was dropped
    else:
        kept += element * (2 * wide + inner)  # input of q, k, v; of gate, up; of down. That of o is kept by attention
    if rank:
        kept += element * rank * LINEARS  # A's outputs
    else:
        kept += 2 * element * wide  # norms that learn: their output before the weight
    return kept


def fused_activations(
    sizes: ModelSizes, *, rank: int, dropout: float, element: int = HALF, mask_element: int = 1
) -> int:
    """Return what autograd keeps of one block of `FusedLayers`, compiled, for one position; args as above."""
    wide, narrow, inner = sizes.hidden, sizes.key_value, sizes.intermediate
    kept = element * 2 * wide + 2 * SINGLE  # the stream before attention and before the MLP; the norms' scales
    kept += element * (wide + 2 * narrow)  # q, k, v, which are one matrix: v is a part of it
    kept += element * (wide + narrow)  # q and k, turned
    kept += element * wide + SINGLE * sizes.heads  # attention's output; log of the sums
    kept += element * 2 * inner  # gate and up
    if dropout:
        kept += (element + mask_element) * (3 * wide + inner)  # each input once for all adapters; what was dropped
    else:
        kept += element * (2 * wide + inner)  # input of q, k, v; of gate, up; of down. That of o is attention's output
    return kept + element * rank * LINEARS  # A's outputs


def backward_workspace(sizes: ModelSizes) -> int:
    """Return the gradients that are there at once at one position of a block, in its MLP, where they are most."""
    # Of the product silu x up: from the base, through the adapter before and after dropout; of the stream: two.
    return HALF * (3 * sizes.intermediate + 2 * sizes.hidden)


def loss_bytes(sizes: ModelSizes) -> int:
    """Return what logits and loss need at one position: 16-bit logits, fp32 ones, their log-softmax, its gradient."""
    return (HALF + 2 * SINGLE + SINGLE) * sizes.vocabulary


def training_peak(
    sizes: ModelSizes, *, batch: int, length: int, rank: int, dropout: float, is_padded: bool, checkpointing: bool
) -> int:
    """Return the most that activations and gradients of activations take in a step.

    The peak is at the loss, where logits are whole, or in the backward pass of the last block.
    """
    positions = batch * length
    block = layer_activations(sizes, length=length, rank=rank, dropout=dropout, is_padded=is_padded)
    # The spliced row, the projector's insides, the last norm's input in fp32 and output.
    ends = HALF * sizes.hidden + (HALF + SINGLE) * sizes.hidden
    image = batch * sizes.patches * HALF * (sizes.tower_hidden + 2 * sizes.hidden)
    kept = sizes.layers * (HALF * sizes.hidden if checkpointing else block) + ends
    at_loss = loss_bytes(sizes)
    in_block = (block if checkpointing else 0) + backward_workspace(sizes)
    return positions * (kept + max(at_loss, in_block)) + image


def optimizer_bytes(trained: int, *, zero: int, gpus: int, offload: bool) -> int:
    """Return masters and moments of AdamW, the gradients, and the trained parameters themselves.

    Args:
        trained: parameters that learn.
        zero: DeepSpeed's stage, 0 without DeepSpeed.
        gpus: processes.
        offload: DeepSpeed keeps masters and moments in the CPU's memory, in stage 3 the parameters too.
    """
    if zero == 0:  # the parameters are their own masters; autocast keeps a 16-bit copy
        return trained * (SINGLE + SINGLE + 2 * SINGLE + HALF)
    states = 0 if offload else 3 * SINGLE * trained // gpus
    gradients = HALF * trained // (gpus if zero >= 2 else 1)
    parameters = 0 if zero == 3 and offload else HALF * trained // (gpus if zero == 3 else 1)
    return states + gradients + parameters


def cache_bytes(sizes: ModelSizes, positions: int) -> int:
    """Return keys and values of so many positions, in 16 bit."""
    return 2 * HALF * sizes.layers * sizes.key_value * positions


def prefill_workspace(sizes: ModelSizes, length: int) -> int:
    """Return what computing the prompt needs at one position besides the cache."""
    # The spliced row, the stream and its norm; silu's output, up and their product; a row of the mask, twice.
    return HALF * (3 * sizes.hidden + 3 * sizes.intermediate) + (HALF + 1) * length


def largest_matrix(sizes: ModelSizes) -> int:
    """Return the size in 16 bit of the largest matrix that is unpacked from 4 or 8 bit to compute with it."""
    return HALF * max(out * into for out, into in sizes.linear_shapes)
