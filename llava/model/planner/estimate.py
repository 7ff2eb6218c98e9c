"""Memory estimate of a setup: bytes needed on each GPU, by use, and the nearest setup that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from llava.constants import FP8
from llava.files.terminal_text import format_size
from llava.model import memory
from llava.model.memory import ModelSizes
from llava.model.planner.setups import Inference, Training
from llava.model.planner.workload import Packs

CONTEXT_BYTES = 800_000_000
"""Memory of a CUDA context and its libraries (measured: 0.78 GB on an H200 with torch 2.11)."""
USABLE_SHARE = 0.92
"""Share of the memory up to which layers keep their activations; fragmentation takes the rest."""
NOTHING_FITS = "it does not fit, nor does anything smaller on such a GPU; use a larger one"


def plan_training(sizes: ModelSizes, run: Training, checkpointed: int | None = None) -> dict[str, int]:
    """Return the peak bytes that a training run allocates on each GPU, by use.

    Args:
        sizes: of the model.
        run: the setup.
        checkpointed: layers with activation checkpointing; None = all of them, if the run has it at all.
    """
    trained, rank = run.trainable_parameters(sizes), run.rank if run.kind == "lora" else 0
    own = trained - (sizes.lora_parameters(run.rank) if run.kind == "lora" else 0)
    frozen = memory.weight_bytes(sizes, run.bits) - memory.HALF * own
    if run.zero == 3:
        frozen = 0 if run.offload else frozen // run.gpus
    load = run.load()
    if checkpointed is None:
        checkpointed = sizes.layers if run.checkpointing else 0
    activations = memory.training_peak(
        sizes,
        load,
        rank=rank,
        dropout=run.dropout if rank else 0.0,
        is_fused=run.is_fused,
        checkpointed=checkpointed,
    )
    if run.trains_tower:
        activations += load.images * memory.tower_activations(sizes, checkpointing=run.checkpointing)
    parts = {
        "frozen weights": frozen,
        "trained weights, gradients, optimizer": memory.optimizer_bytes(
            trained, zero=run.zero, gpus=run.gpus, offload=run.offload
        ),
        "activations": activations,
    }
    if run.zero == 3:
        parts["gathered weights"] = min(memory.HALF * memory.GATHERED_PARAMETERS, memory.weight_bytes(sizes, 16))
    if run.bits != 16:
        parts["unpacked weights"] = 2 * memory.largest_matrix(sizes)
    return parts


def plan_inference(sizes: ModelSizes, run: Inference) -> dict[str, int]:
    """Return the peak bytes that inference allocates on a GPU, by use."""
    cache = memory.cache_bytes(sizes, run.batch * (run.length + run.new_tokens))
    prompt = memory.cache_bytes(sizes, run.batch * run.length)
    workspace = run.batch * run.length * memory.prefill_workspace(sizes, run.length)
    growth = cache // sizes.layers // 2  # the longer copy of one layer's keys, while the shorter one is live
    parts = {
        "weights": memory.weight_bytes(sizes, run.bits),
        "cache of keys and values": cache,
        # Decoding begins after the prefill: the peak is in one or the other.
        "computation": max(workspace - (cache - prompt), growth, 0),
    }
    if run.bits not in (16, FP8):
        parts["unpacked weights"] = memory.largest_matrix(sizes)
    return parts


def plan_device(sizes: ModelSizes, run: Training | Inference, available: int | None = None) -> dict[str, int]:
    """Return the peak bytes of a run on each GPU, by use, with what is not in the allocator's count of live tensors.

    Args:
        sizes: of the model.
        run: the setup.
        available: bytes free on each GPU, which decide how many layers are checkpointed; None = all of them are.
    """
    if isinstance(run, Inference):
        return {**plan_inference(sizes, run), "CUDA itself": CONTEXT_BYTES}
    parts = plan_training(sizes, run, checkpointed_layers(sizes, run, available))
    if run.zero and not run.offload:
        # ZeRO makes them in one tensor at the update; the blocks that activations leave behind are too small for it.
        parts["gradients in fp32 at the update"] = memory.SINGLE * run.trainable_parameters(sizes) // run.gpus
    return {**parts, "CUDA itself": CONTEXT_BYTES}


def checkpointed_layers(sizes: ModelSizes, run: Training, available: int | None) -> int:
    """Return how many layers are checkpointed, as training chooses them; `available` as in `plan_device`."""
    if not run.checkpointing:
        return 0
    if run.checkpoint_layers.isdecimal():
        return min(int(run.checkpoint_layers), sizes.layers)
    if not run.chooses_layers or available is None:
        return sizes.layers
    rest = dataclasses.replace(run, checkpoint_layers="all")
    others = sum(plan_device(sizes, rest).values()) - plan_training(sizes, rest)["activations"]
    return memory.fewest_checkpointed(
        lambda count: others + plan_training(sizes, rest, count)["activations"],
        sizes.layers,
        USABLE_SHARE * available,
    )


def needed_bytes(sizes: ModelSizes, run: Training | Inference, available: int | None = None) -> int:
    """Return the sum of `plan_device`."""
    return sum(plan_device(sizes, run, available).values())


def fits(sizes: ModelSizes, run: Training | Inference, available: int) -> bool:
    """Tell whether a run fits, with as many checkpointed layers as it may have."""
    return needed_bytes(sizes, run) <= available


def smaller_batches(run: Training) -> Iterator[Training]:
    """Yield the run, then those with smaller micro-batches and more of them: the same rows per step."""
    rows = run.batch * run.accumulation
    for batch in range(run.batch, 0, -1):
        if rows % batch == 0:
            yield dataclasses.replace(run, batch=batch, accumulation=rows // batch)


def fitting_training(sizes: ModelSizes, run: Training, available: int) -> Training | None:
    """Return the nearest setup that fits, None if there is none; see `smaller_training`."""
    return next((other for other in smaller_training(run) if fits(sizes, other, available)), None)


def smaller_training(run: Training) -> Iterator[Training]:
    """Yield setups of the same rows per step that need less and less memory.

    In this order: activation checkpointing; smaller micro-batches; 4-bit weights under LoRA, from the given batch
    on; partitioning over several GPUs, then fp32 weights in CPU memory.
    """
    yield run
    run = dataclasses.replace(run, checkpointing=True, checkpoint_layers="auto")
    yield from smaller_batches(run)
    if run.kind == "lora" and run.bits == 16 and run.zero != 3:
        yield from smaller_batches(dataclasses.replace(run, bits=4))
    if run.bits == 16:
        *_, smallest = smaller_batches(run)
        if run.gpus > 1:
            yield dataclasses.replace(smallest, zero=3)
        yield dataclasses.replace(smallest, zero=3, offload=True)


def fitting_inference(sizes: ModelSizes, run: Inference, available: int) -> Inference | None:
    """Return the nearest setup that fits, None if there is none: smaller batches first, then fewer bits."""
    return next((other for other in _smaller_inference(run) if fits(sizes, other, available)), None)


def _smaller_inference(run: Inference) -> Iterator[Inference]:
    narrower = {16: (16, 8, 4), FP8: (FP8, 4), 8: (8, 4), 4: (4,)}
    for bits in narrower[run.bits]:
        batch = run.batch
        while batch:
            yield dataclasses.replace(run, bits=bits, batch=batch)
            batch //= 2


def describe_plan(sizes: ModelSizes, run: Training | Inference, available: int | None) -> str:
    """Return a table of needed and available memory, and the nearest setup that fits.

    Args:
        sizes: of the model.
        run: the planned run.
        available: bytes free on each GPU; None = unknown.
    """
    parts = plan_device(sizes, run, available)
    lines = [*describe_work(sizes, run, available), *_columns({**parts, "needed on each GPU": sum(parts.values())})]
    if available is None:
        return "\n".join(lines)
    lines += _columns({"available": available})
    if fits(sizes, run, available):
        return "\n".join([*lines, "it fits"])
    is_training = isinstance(run, Training)
    other = fitting_training(sizes, run, available) if is_training else fitting_inference(sizes, run, available)
    if other is None:
        return "\n".join([*lines, NOTHING_FITS])
    less = format_gigabytes(needed_bytes(sizes, other, available))
    lines.append(f"it does not fit; this does, with {less}: {other.flags()}")
    return "\n".join([*lines, *describe_lost_sharing(run, other)])


def describe_work(sizes: ModelSizes, run: Training | Inference, available: int | None) -> list[str]:
    """Return the line about a training run's micro-batches and checkpointed layers; none for inference."""
    if isinstance(run, Inference):
        return []
    load, layers = run.load(), checkpointed_layers(sizes, run, available)
    shared = ""
    if isinstance(run.workload, Packs):
        shared = f", {run.workload.questions_per_image(run.batch, run.gpus):.1f} questions per image"
    recomputed = f"{layers} of {sizes.layers} layers" if layers else "no layer"
    text = f"largest of its batches of {run.batch}: {load.positions:,} positions{shared}"
    return [f"  {text}; activation checkpointing: {recomputed}"]


def describe_lost_sharing(run: Training | Inference, other: Training | Inference) -> list[str]:
    """Return the line about the work that another setup's smaller batches cost because images are shared less."""
    if isinstance(run, Inference) or isinstance(other, Inference) or not isinstance(run.workload, Packs):
        return []
    before, after = (
        setup.workload.mean_load(setup.batch, setup.gpus).positions / setup.batch for setup in (run, other)
    )
    if after < 1.05 * before:
        return []
    return [
        f"smaller batches share fewer images: {after:.0f} positions a question instead of {before:.0f}, "
        f"{after / before:.1f} times the work"
    ]


def _columns(sizes: dict[str, int]) -> list[str]:
    return [f"  {name:<37}  {format_gigabytes(size):>9}" for name, size in sizes.items()]


def format_gigabytes(size: int) -> str:
    """Return a size for a column of gigabytes; one that would be 0.0 there has its own unit."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else format_size(size)
