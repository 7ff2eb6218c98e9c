"""Setups that the memory planner compares: a training or inference run as its flags describe it."""

from __future__ import annotations

import dataclasses

from llava.constants import FP8
from llava.model.memory import ModelSizes, StepLoad
from llava.model.planner.workload import Packs, Workload

PROMPT_LENGTH = 640
"""Positions of a prompt of the VQA table: 35 of text, 576 of the image, a short question."""
MAX_LENGTH = 2048
"""Positions of a pack's row where attention takes a dense mask: `--model_max_length` of the scripts."""


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        workload: packs, or padded rows.
        kind: "lora", "full" (all of the LLM and the projector) or "projector".
        batch: rows of a micro-batch, on each GPU.
        accumulation: micro-batches of a step.
        rank: of the adapters.
        dropout: 0..1.
        bits: of the LLM's weights.
        checkpointing: `--gradient_checkpointing`.
        checkpoint_layers: `--checkpoint_layers`: auto, all or a number.
        zero: DeepSpeed's stage; 0 = no DeepSpeed.
        offload: fp32 weights and moments in CPU memory, in stage 3 the weights too.
        gpus: processes.
        trains_tower: `--unfreeze_mm_vision_tower`.
        has_flex: packs go through FlexAttention; False = dense masks, as on GPUs before Ampere.
        compiles: layers over packs are compiled.
        max_length: positions of a row of packs with dense masks.
    """

    workload: Workload
    kind: str = "lora"
    batch: int = 16
    accumulation: int = 1
    rank: int = 128
    dropout: float = 0.05
    bits: int = 16
    checkpointing: bool = True
    checkpoint_layers: str = "auto"
    zero: int = 2
    offload: bool = False
    gpus: int = 1
    trains_tower: bool = False
    has_flex: bool = True
    compiles: bool = True
    max_length: int = MAX_LENGTH

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, on all GPUs."""
        return self.batch * self.accumulation * self.gpus

    @property
    def is_fused(self) -> bool:
        """Whether the layers run as a compiled `FusedLora`, as far as the flags tell."""
        runs_compiled = isinstance(self.workload, Packs) and self.has_flex and self.compiles
        return runs_compiled and self.kind == "lora" and self.bits == 16 and self.zero != 3

    @property
    def chooses_layers(self) -> bool:
        """Whether training checkpoints only the layers whose activations don't fit, see `FewestCheckpoints`."""
        is_packed = isinstance(self.workload, Packs)
        return self.checkpointing and self.checkpoint_layers == "auto" and is_packed and self.bits == 16

    def load(self) -> StepLoad:
        """Return the size of the largest micro-batch."""
        return self.workload.largest(self.batch, self.gpus, budget=None if self.has_flex else self.max_length)

    def trainable_parameters(self, sizes: ModelSizes) -> int:
        """Return the number of trainable parameters."""
        llm = {"lora": sizes.lora_parameters(self.rank), "full": sizes.llm_parameters, "projector": 0}[self.kind]
        return llm + sizes.projector_parameters + (sizes.tower_parameters if self.trains_tower else 0)

    def flags(self) -> str:
        """Return the flags of the training program for this run."""
        words = [
            f"--per_device_train_batch_size {self.batch}",
            f"--gradient_accumulation_steps {self.accumulation}",
            f"--gradient_checkpointing {self.checkpointing}",
        ]
        words += [f"--checkpoint_layers {self.checkpoint_layers}"] if self.checkpoint_layers != "auto" else []
        words += [f"--bits {self.bits}"] if self.bits != 16 else []
        if self.zero:
            words.append(f"--deepspeed scripts/zero{self.zero}{'_offload' if self.offload else ''}.json")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Inference:
    """An inference run.

    Attributes:
        batch: requests of a batch.
        length: of a prompt, in positions.
        new_tokens: length of the longest answer, in tokens.
        bits: of the LLM's weights; "fp8" for FP8.
    """

    batch: int = 1
    length: int = PROMPT_LENGTH
    new_tokens: int = 128
    bits: int | str = 16

    def flags(self) -> str:
        """Return the flags of the batch program for this run."""
        weights = {16: "", FP8: " --fp8"}.get(self.bits, f" --load-{self.bits}bit")
        return f"--batch-size {self.batch}{weights}"
