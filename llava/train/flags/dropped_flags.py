"""Removed flags of transformers 4.37 and of the original LLaVA: what applies instead, one sentence each.

A value that asks for the present behaviour is accepted and logged; any other is refused with the sentence. Renamed
flags are in `llava.train.flags.arguments.renamed_flags`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ON = ("true", "yes", "t", "y", "1")
OFF = ("false", "no", "f", "n", "0")
"""Spellings of booleans on a command line, in lower case."""
_NO_TPU = "TPUs are not supported; leave it out"
_ONE_AUTOCAST = "mixed precision is always PyTorch's own; leave it out and choose with --bf16 or --fp16"


class Dropped(NamedTuple):
    """A removed flag.

    Attributes:
        sentence: what applies instead, and what to pass; VALUE stands for the value given.
        harmless: values, in lower case, that ask for the present behaviour; ("*",) = all.
    """

    sentence: str
    harmless: tuple[str, ...] = ()


DROPPED_FLAGS = {
    "overwrite_output_dir": Dropped(
        "a run resumes from the checkpoints in --output_dir; to start over, which moves them to earlier-1, pass "
        "--resume_from_checkpoint none",
        OFF,
    ),
    "save_safetensors": Dropped("weights and adapters are always written as safetensors; leave it out", ON),
    "use_mps_device": Dropped("Apple's GPU is used where there is one, unless --use_cpu True forbids it", ("*",)),
    "jit_mode_eval": Dropped("validation runs the model as it is trained, never traced; leave it out", OFF),
    "use_ipex": Dropped("Intel's extension for PyTorch is not used; leave it out", OFF),
    "fp16_opt_level": Dropped(f"Apex is not used, {_ONE_AUTOCAST}", ("o1",)),
    "half_precision_backend": Dropped(_ONE_AUTOCAST, ("auto", "cuda_amp", "cpu_amp")),
    "fp16_backend": Dropped(_ONE_AUTOCAST, ("auto", "amp", "cuda_amp", "cpu_amp")),
    "tpu_num_cores": Dropped(_NO_TPU),
    "tpu_metrics_debug": Dropped(_NO_TPU, OFF),
    "past_index": Dropped("Llama keeps no state from one batch to the next; leave it out", ("-1",)),
    "fsdp_min_num_params": Dropped(
        'pass it as --fsdp_config \'{"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": VALUE}\'', ("0",)
    ),
    "fsdp_transformer_layer_cls_to_wrap": Dropped(
        'pass it as --fsdp_config \'{"transformer_layer_cls_to_wrap": ["VALUE"]}\''
    ),
    "adafactor": Dropped("pass --optim adafactor", OFF),
    "group_by_length": Dropped("pass --group_by_modality_length True, which groups rows of similar length", OFF),
    "use_legacy_prediction_loop": Dropped("there is one validation loop; leave it out", OFF),
    "include_inputs_for_metrics": Dropped(
        "validation measures loss and accuracy from the rows alone; leave it out", OFF
    ),
    "push_to_hub_organization": Dropped("pass --repo ORGANIZATION/NAME to scripts/push_to_hub.py, after the training"),
    "mp_parameters": Dropped("SageMaker's model parallelism is not supported; leave it out", ("",)),
    "torchdynamo": Dropped("pass --compile_layers on, which compiles the LLM's layers"),
    "ray_scope": Dropped("there is no hyperparameter search; leave it out", ("last",)),
    "dispatch_batches": Dropped("each process reads its own rows; leave it out", OFF),
    "split_batches": Dropped(
        "--per_device_train_batch_size is the batch of one process; divide it by the number of processes yourself", OFF
    ),
    "include_tokens_per_second": Dropped(
        "pass --include_num_input_tokens_seen True, which logs the tokens with the time", OFF
    ),
    "mpt_attn_impl": Dropped("the language model is Llama, never MPT; leave it out", ("*",)),
}

DROPPED_OPTIMIZERS = {
    "adamw_hf": "pass --optim adamw_torch, the same method",
    "adamw_apex_fused": "Apex is not used; pass --optim adamw_torch_fused, the same method in one kernel",
}


def settle_dropped_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the dropped flags from a command line.

    Args:
        words: of the command line.

    Returns:
        the other words, and a log line for each dropped flag with a harmless value.

    Raises:
        ValueError: with the sentence of each dropped flag or optimizer that is not harmless.
    """
    kept, notes, reasons = [], [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, value = _dropped(word)
        if name is None:
            kept.append(word)
            if (optimizer := _named_optimizer(word, rest)) in DROPPED_OPTIMIZERS:
                reasons.append(f"--optim {optimizer} (dropped by transformers 5): {DROPPED_OPTIMIZERS[optimizer]}")
            continue
        if value is None and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        shown = f"--{name}" if value is None else f"--{name} {value}"
        sentence, harmless = DROPPED_FLAGS[name]
        if harmless == ("*",) or (value if value is not None else "true").lower() in harmless:
            why = sentence.removesuffix("; leave it out") if harmless == ("*",) else "it is what happens anyway"
            notes.append(f"{shown} changes nothing: {why}")
        else:
            reasons.append(f"{shown} (dropped by transformers 5): {sentence.replace('VALUE', value or '...')}")
    if reasons:
        raise ValueError("; ".join(reasons))
    return kept, notes


def _named_optimizer(word: str, rest: Sequence[str]) -> str | None:
    """Return the value of `--optim`, in the word or after it; None for any other word."""
    flag, equals, value = word.partition("=")
    if flag != "--optim":
        return None
    return value if equals else next(iter(rest), None)


def _dropped(word: str) -> tuple[str | None, str | None]:
    """Return the dropped flag that a word names and its value; (None, None) for any other word."""
    if not word.startswith("--"):
        return None, None
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if name in DROPPED_FLAGS:
        return name, value if equals else None
    if name.removeprefix("no_") in DROPPED_FLAGS and not equals:
        return name.removeprefix("no_"), "False"
    return None, None
