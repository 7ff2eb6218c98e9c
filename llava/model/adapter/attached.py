"""Attach a LoRA adapter to a model through peft, unmerged: to compare it with a merge, or to train it further."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from llava.model.adapter.lora import OUTSIDE_LLM, Adapter, refuse_partial
from llava.model.adapter.merge import add_adapter, fit_to_base
from llava.model.adapter.tensor_names import PEFT_PREFIX
from llava.model.checkpoint.lazy_tensors import LazyTensors, check_finite
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import released_name


def attach(
    model: LlavaLlamaForCausalLM, adapter: Adapter, *, base_name: str | None = None, is_trainable: bool = False
) -> nn.Module:
    """Wrap a model with an adapter; a tensor of the adapter that fits nowhere is an error.

    Products for the LLM's blocks are attached. Those for other weights (embedding, head, vision tower, projector) are
    merged, since nothing else reads these weights through peft.

    Args:
        model: the base, with or without the adapter's `replaced` tensors.
        adapter: from `read_adapter`.
        base_name: recorded as the base; None = as the adapter records it.
        is_trainable: whether the products are trainable parameters.

    Raises:
        ValueError: if the adapter doesn't fit the model, or holds NaN or infinity.
    """
    base = _tensors_of(model)
    refuse_partial(adapter, base)
    adapter = fit_to_base(adapter, base)
    _change_weights(model, base, adapter.outside_llm())
    if not adapter.inside_llm().pairs:
        if is_trainable:
            raise ValueError(
                "the adapter has nothing in the LLM's blocks that could be trained further; merge it first"
            )
        return model
    wrapped = _wrap_blocks(model, adapter, base_name=base_name, is_trainable=is_trainable)
    _fill(wrapped, adapter.inside_llm())
    return wrapped


def _wrap_blocks(
    model: LlavaLlamaForCausalLM, adapter: Adapter, *, base_name: str | None = None, is_trainable: bool = False
) -> peft.PeftModel:
    """Wrap the LLM's blocks with peft layers of the adapter's ranks and scales; their values are not set."""
    settings, inside = adapter.settings, adapter.inside_llm()
    modules = {name: name.removesuffix(".weight") for name in inside.pairs}
    ranks = {module: inside.pairs[name][0].shape[0] for name, module in modules.items()}
    root = settings.get("use_rslora")
    alphas = {
        module: inside.scale(name) * (ranks[module] ** 0.5 if root else ranks[module])
        for name, module in modules.items()
    }
    rank, alpha = max(ranks.values(), default=settings["r"]), settings["lora_alpha"]
    model.name_or_path = base_name or settings.get("base_model_name_or_path")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: own for module, own in ranks.items() if own != rank},
        alpha_pattern={module: own for module, own in alphas.items() if abs(own - alpha) > 1e-9 * alpha},
        lora_dropout=settings.get("lora_dropout") or 0.0,
        bias=settings.get("bias") or "none",
        target_modules=_targets(model, set(modules.values())),
        exclude_modules=OUTSIDE_LLM,
        use_dora=bool(settings.get("use_dora")),
        use_rslora=bool(root),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        inference_mode=not is_trainable,
    )
    return peft.get_peft_model(model, config)


def _targets(model: LlavaLlamaForCausalLM, modules: set[str]) -> list[str]:
    """Return the modules' leaf names where these select the same layers, else their full names."""
    leaves = {module.rpartition(".")[2] for module in modules}
    named = model.model.layers.named_modules(prefix="model.layers")
    selected = {name for name, module in named if name.rpartition(".")[2] in leaves and isinstance(module, nn.Linear)}
    return sorted(leaves if selected == modules else modules)


def _tensors_of(model: LlavaLlamaForCausalLM) -> LazyTensors:
    """Return the model's tensors by released name; quantised weights have the shape of their linear layer."""
    named = {released_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    entries = LazyTensors.of({**named, **_unused_tensors(model)}).entries
    for name, module in model.named_modules():
        weight = released_name(f"{name}.weight")
        if isinstance(module, nn.Linear) and weight in entries:
            entries[weight] = entries[weight]._replace(shape=torch.Size([module.out_features, module.in_features]))
    return LazyTensors(entries)


def _unused_tensors(model: LlavaLlamaForCausalLM) -> dict[str, Tensor]:
    return {} if model.config.mm_vision_config is None else model.get_vision_tower().unused_tensors


@torch.no_grad()
def _change_weights(model: LlavaLlamaForCausalLM, base: LazyTensors, adapter: Adapter) -> None:
    """Replace the weights that were trained without an adapter, and merge products into others, in place."""
    changed = add_adapter(base, adapter)
    parameters = {released_name(name): parameter for name, parameter in model.named_parameters()}
    for name in sorted({*adapter.pairs, *adapter.replaced}):
        value = changed[name]
        check_finite(name, value, changed.entries[name].source)
        if name not in parameters:
            _unused_tensors(model)[name] = value
        elif parameters[name].is_meta or parameters[name].shape != value.shape:
            raise ValueError(
                f"{name} is offloaded or quantised, so the adapter can't change it; merge the adapter first"
            )
        else:
            parameters[name].copy_(value)


def _fill(wrapped: peft.PeftModel, adapter: Adapter) -> None:
    """Set the values of all products; one that fits nowhere is an error."""
    state: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        parts = {"lora_A.weight": pair[0], "lora_B.weight": pair[1]}
        if name in adapter.magnitudes:
            parts["lora_magnitude_vector"] = adapter.magnitudes[name]
        for part, entry in parts.items():
            state[f"{module}.{part}"] = entry.read()
            check_finite(f"{module}.{part}", state[f"{module}.{part}"], entry.source)
    found = peft.set_peft_model_state_dict(wrapped, state)
    lacking = [name for name in found.missing_keys if ".lora_" in name] + list(found.unexpected_keys)
    if lacking:
        raise ValueError(
            f"{len(lacking)} tensors of the adapter don't fit the model, {lacking[0]} first; merge it with peft"
        )
