"""Import paths and names of the original LLaVA, each with its place in this code base: one table, resolved lazily.

Third-party code imports `llava.utils`, `llava.model.language_model.llava_llama` or `llava.mm_utils.expand2square`.
Paths that are not files here become modules whose names are looked up in `MODULES` when they are asked for
(`OriginalModules`); modules that are files hand on what they lack (`lazy_names`). What is left out for good says so and
names what to use instead (`LEFT_OUT`).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any

_LLAMA, _ARCH, _TOWER = "llava.model.llava_llama", "llava.model.llava_arch", "llava.model.vision_tower"
_CONFIGURATION, _MM_UTILS = "llava.model.configuration", "llava.mm_utils"
_TRAINING, _TRAINER = "llava.original.training", "llava.original.trainer"
_FLAGS, _TEXTVQA = "llava.train.flags", "llava.eval.benchmarks.textvqa"
_EVALUATION, _PROJECTORS, _LOGS = "llava.original.evaluation", "llava.original.projectors", "llava.original.logs"


def _from(place: str, names: str, **renamed: str) -> dict[str, str]:
    """Return name -> "module:attribute" for names that one module has, under the same or another name."""
    return {name: f"{place}:{name}" for name in names.split()} | {
        name: f"{place}:{attribute}" for name, attribute in renamed.items()
    }


_MODEL = _from(_LLAMA, "LlavaLlamaForCausalLM") | _from(_CONFIGURATION, "LlavaConfig")
_CONSTANTS = _from(
    "llava.constants",
    "IGNORE_INDEX IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN DEFAULT_IM_START_TOKEN "
    "DEFAULT_IM_END_TOKEN",
)
_ZERO_3 = _from(_TRAINING, "maybe_zero_3 get_mm_adapter_state_maybe_zero_3")
_LOAD_IMAGE = _from("llava.inference.load_image", "load_image")
_CHUNKS = _from(_EVALUATION, "get_chunk split_list eval_model")

MODULES: Mapping[str, Mapping[str, str]] = {
    "llava": _from(_LLAMA, "LlavaLlamaForCausalLM"),
    "llava.utils": _from(
        _LOGS,
        "StreamToLogger build_logger disable_torch_init pretty_print_semaphore rank0_print server_error_msg "
        "moderation_msg",
    )
    | _from("llava.constants", "LOGDIR"),
    "llava.mm_utils": _from(
        "llava.original.images",
        "divide_to_patches expand2square get_anyres_image_grid_shape process_anyres_image resize_and_pad_image "
        "select_best_resolution",
    ),
    "llava.model": _MODEL,
    "llava.model.utils": _from("llava.original.logs", "auto_upgrade") | _from(_MM_UTILS, "KeywordsStoppingCriteria"),
    "llava.model.llava_arch": _from("llava.original.images", "get_anyres_image_grid_shape unpad_image")
    | _from(_PROJECTORS, "build_vision_projector")
    | _CONSTANTS,
    "llava.model.language_model": {},
    "llava.model.language_model.llava_llama": _MODEL
    | _from(_LLAMA, "LlavaLlamaModel")
    | _from(_ARCH, "LlavaMetaModel LlavaMetaForCausalLM")
    | _from("transformers", "AutoConfig AutoModelForCausalLM LlamaConfig LlamaModel LlamaForCausalLM")
    | _from("transformers.modeling_outputs", "CausalLMOutputWithPast")
    | _from("transformers.generation.utils", "GenerateOutput"),
    "llava.model.multimodal_encoder": {},
    "llava.model.multimodal_encoder.builder": _from(_ARCH, "build_vision_tower") | _from(_TOWER, "CLIPVisionTower"),
    "llava.model.multimodal_encoder.clip_encoder": _from(_TOWER, "CLIPVisionTower"),
    "llava.model.multimodal_projector": {},
    "llava.model.multimodal_projector.builder": _from(_PROJECTORS, "IdentityMap build_vision_projector"),
    "llava.eval.run_llava": _from("llava.original.images", "load_images image_parser") | _LOAD_IMAGE,
    "llava.serve.cli": _LOAD_IMAGE,
    "llava.eval.model_vqa": _CHUNKS,
    "llava.eval.model_vqa_loader": _CHUNKS,
    "llava.eval.model_vqa_mmbench": {**_CHUNKS, **_from(_EVALUATION, "", eval_model="eval_model_mmbench")},
    "llava.eval.model_vqa_science": {**_CHUNKS, **_from(_EVALUATION, "", eval_model="eval_model_science")},
    "llava.eval.m4c_evaluator": _from(_EVALUATION, "STVQAANLSEvaluator STVQAAccuracyEvaluator")
    | _from(_TEXTVQA, "EvalAIAnswerProcessor TextVQAAccuracyEvaluator"),
    "llava.eval.eval_textvqa": _from(_TEXTVQA, "TextVQAAccuracyEvaluator prompt_processor"),
    "llava.eval.eval_science_qa": _from(_EVALUATION, "convert_caps")
    | _from("llava.eval.benchmarks.scienceqa.score", "get_pred_idx"),
    "llava.train.llava_trainer": _from(
        _TRAINER,
        "LLaVATrainer LengthGroupedSampler get_length_grouped_indices get_modality_length_grouped_indices",
    )
    | _ZERO_3,
    "llava.train.train": _from(
        _TRAINING,
        "DataCollatorForSupervisedDataset LazySupervisedDataset find_all_linear_names get_peft_state_maybe_zero_3 "
        "get_peft_state_non_lora_maybe_zero_3 make_supervised_data_module preprocess preprocess_multimodal "
        "safe_save_model_for_hf_trainer smart_tokenizer_and_embedding_resize",
        preprocess_llama_2="preprocess",
        preprocess_mpt="preprocess",
        preprocess_plain="preprocess",
        preprocess_v1="preprocess",
    )
    | _from(_TRAINER, "LLaVATrainer")
    | _from(f"{_FLAGS}.arguments", "ModelArguments DataArguments")
    | _from(f"{_FLAGS}.training_arguments", "TrainingArguments")
    | _from(_LOGS, "rank0_print")
    | _from(_MM_UTILS, "tokenizer_image_token")
    | _MODEL
    | _ZERO_3
    | _CONSTANTS,
}
"""By module, name -> "module:attribute"; "module" alone is that module."""

_PROGRAMS = {"llava.eval.model_vqa": "llava.eval.model_vqa_loader"}
"""Modules that `python -m` runs, and the program that stands for each."""

_LLAMA_ONLY = "this code base is LLaVA-1.5 on Llama and Vicuna; use haotian-liu/LLaVA or transformers for other LLMs"
_SERVING = (
    "chat with `python -m llava.serve.cli`, or export with scripts/convert_checkpoint.py --layout hf and serve that "
    "with vLLM, SGLang or `transformers serve`"
)
_ATTENTION = "attention needs no patch: PyTorch's SDPA is used, FlashAttention 2 with use_flash_attn=True"
_SCORES = "score answers with `python -m llava.eval.vqa_score`, and look at them with `python -m llava.eval.report`"
_REVIEWS = "review answers with `python -m llava.eval.eval_gpt_review_bench`"
_ANSWERS = "answer a question file with `python -m llava.eval.model_vqa_loader`"
_SCALES = "towers over several scales are not supported"
_MODERATION = "no text is sent to a moderation service; call OpenAI's client yourself"
_ANSWER_BATCH = "use llava.inference.batch.answer_batch.answer_batch"
_DELTAS = "weights are loaded as they are; scripts/convert_checkpoint.py writes other layouts"

LEFT_OUT: Mapping[str, str] = {
    f"llava.{path}.{name}": instead
    for path, names, instead in (
        ("model.language_model", "llava_mpt llava_mistral", _LLAMA_ONLY),
        ("model", "LlavaMptForCausalLM LlavaMptConfig LlavaMistralForCausalLM LlavaMistralConfig", _LLAMA_ONLY),
        ("model.multimodal_encoder.builder", "CLIPVisionTowerS2", _SCALES),
        ("model.multimodal_encoder.clip_encoder", "CLIPVisionTowerS2", _SCALES),
        ("model.multimodal_projector.builder", "SimpleResBlock", "no projector of LLaVA-1.5 is made of it"),
        ("model", "apply_delta consolidate make_delta", _DELTAS),
        ("utils", "violates_moderation", _MODERATION),
        ("eval.model_vqa_loader", "CustomDataset create_data_loader", _ANSWER_BATCH),
        ("eval.m4c_evaluator", "TextCapsBleu4Evaluator", "BLEU needs Java; use pycocoevalcap itself"),
        ("eval", "eval_gpt_review eval_gpt_review_visual", _REVIEWS),
        ("eval", "eval_science_qa_gpt4 eval_science_qa_gpt4_requery", _SCORES),
        ("eval", "generate_webpage_data_from_table", _SCORES),
        ("eval", "model_qa qa_baseline_gpt35", _ANSWERS),
        ("serve", "controller gradio_web_server model_worker register_worker sglang_worker test_message", _SERVING),
        ("train.llava_trainer", "split_to_even_chunks", "use llava.data.length_sampler.group_by_length"),
        ("train", "llama_flash_attn_monkey_patch llama_xformers_attn_monkey_patch train_xformers", _ATTENTION),
    )
    for name in names.split()
}
"""Modules and names of the original without a counterpart, and what to use instead."""


def lazy_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module: looks its missing names up in `MODULES`, and `__all__` for `import *`."""
    names = MODULES.get(module, {})

    def find(name: str) -> Any:
        if name == "__all__":
            own = [key for key in vars(sys.modules[module]) if not key.startswith("_")]
            return sorted({*own, *names} - {"annotations", "install", "lazy_names"})
        if name in names:
            place, _, attribute = names[name].partition(":")
            return getattr(importlib.import_module(place), attribute)
        refuse_left_out(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def refuse_left_out(name: str) -> None:
    """Raise an error that names the replacement, if a module or name of the original is left out.

    Raises:
        ImportError: if it is.
    """
    if name in LEFT_OUT:
        raise ImportError(f"{name} of the original LLaVA is left out here; {LEFT_OUT[name]}", name=name)


class OriginalModules:
    """Finder and loader of the modules of `MODULES` that are not files; the finder of files is asked first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module of the original.

        Raises:
            ImportError: if it is left out for good.
        """
        if not fullname.startswith("llava."):
            return None
        refuse_left_out(fullname)
        if fullname not in MODULES:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin=fullname, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to Python to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give a module its lazy names."""
        module.__doc__ = f"{module.__name__} of the original LLaVA; see llava.original_names."
        module.__getattr__ = lazy_names(module.__name__)
        if _LLAMA in "".join(MODULES[module.__name__].values()):
            importlib.import_module(_LLAMA)  # as there, importing the module registers the model with transformers

    def get_source(self, fullname: str) -> str:
        """Return what `python -m` runs."""
        program = _PROGRAMS.get(fullname)
        return f"from {program} import main\nraise SystemExit(main())\n" if program else ""

    def get_code(self, fullname: str) -> CodeType:
        """Return what `python -m` runs, compiled."""
        return compile(self.get_source(fullname), f"<{fullname}>", "exec")


def install() -> None:
    """Let imports find the original's modules; a second call changes nothing."""
    if not any(isinstance(finder, OriginalModules) for finder in sys.meta_path):
        sys.meta_path.append(OriginalModules())
