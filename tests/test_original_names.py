"""Names that third-party code imports from the original: each is found, or says what to use instead."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.model.checkpoint.loading_options import HARMLESS, LoadingOptions
from llava.original_names import LEFT_OUT, MODULES, OriginalModules, install

NAMES = [(module, name) for module, names in MODULES.items() for name in names]
FREQUENT = {
    "llava": "LlavaLlamaForCausalLM",
    "llava.constants": "IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN "
    "IGNORE_INDEX DEFAULT_IMAGE_PATCH_TOKEN IMAGE_PLACEHOLDER LOGDIR WORKER_HEART_BEAT_INTERVAL "
    "CONTROLLER_HEART_BEAT_EXPIRATION",
    "llava.conversation": "conv_templates SeparatorStyle default_conversation Conversation conv_vicuna_v1 "
    "conv_llava_v1 conv_llava_llama_2 conv_mpt conv_llava_plain",
    "llava.mm_utils": "process_images tokenizer_image_token get_model_name_from_path KeywordsStoppingCriteria "
    "load_image_from_base64 expand2square process_anyres_image select_best_resolution get_anyres_image_grid_shape "
    "resize_and_pad_image divide_to_patches",
    "llava.utils": "disable_torch_init build_logger StreamToLogger pretty_print_semaphore server_error_msg "
    "moderation_msg",
    "llava.model": "LlavaLlamaForCausalLM LlavaConfig",
    "llava.model.builder": "load_pretrained_model",
    "llava.model.language_model.llava_llama": "LlavaLlamaForCausalLM LlavaConfig LlavaLlamaModel LlavaMetaModel "
    "LlavaMetaForCausalLM",
    "llava.model.llava_arch": "LlavaMetaModel LlavaMetaForCausalLM unpad_image get_anyres_image_grid_shape",
    "llava.model.multimodal_encoder.builder": "build_vision_tower",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTower",
    "llava.model.multimodal_projector.builder": "build_vision_projector IdentityMap",
    "llava.eval.run_llava": "eval_model load_image load_images image_parser",
    "llava.eval.model_vqa": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_loader": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_mmbench": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_science": "eval_model get_chunk split_list",
    "llava.eval.eval_pope": "eval_pope",
    "llava.eval.eval_textvqa": "eval_single prompt_processor",
    "llava.eval.eval_science_qa": "get_pred_idx convert_caps",
    "llava.eval.m4c_evaluator": "EvalAIAnswerProcessor TextVQAAccuracyEvaluator STVQAAccuracyEvaluator "
    "STVQAANLSEvaluator",
    "llava.serve.cli": "load_image main",
    "llava.train.llava_trainer": "LLaVATrainer LengthGroupedSampler get_modality_length_grouped_indices "
    "get_length_grouped_indices get_mm_adapter_state_maybe_zero_3 maybe_zero_3",
    "llava.train.train": "train preprocess preprocess_multimodal preprocess_v1 preprocess_plain preprocess_llama_2 "
    "LazySupervisedDataset DataCollatorForSupervisedDataset make_supervised_data_module ModelArguments DataArguments "
    "TrainingArguments smart_tokenizer_and_embedding_resize safe_save_model_for_hf_trainer find_all_linear_names "
    "get_peft_state_maybe_zero_3 get_peft_state_non_lora_maybe_zero_3 maybe_zero_3 LLaVATrainer rank0_print",
}
"""What scripts, notebooks and harnesses import most."""
FUNCTIONS = ("create_data_loader", "split_to_even_chunks", "violates_moderation")
"""Of `LEFT_OUT`; its other names in small letters are modules."""


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_of_the_table_is_found(module, name):
    namespace = {}
    exec(f"from {module} import {name} as found", namespace)
    assert namespace["found"] is not None


@pytest.mark.parametrize("module", FREQUENT)
def test_frequent_imports(module):
    exec(f"from {module} import {', '.join(FREQUENT[module].split())}", {})


@pytest.mark.parametrize("module", MODULES)
def test_import_star_gives_the_names(module):
    namespace = {}
    exec(f"from {module} import *", namespace)
    assert MODULES[module].keys() <= namespace.keys()
    assert "lazy_names" not in namespace


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_says_what_to_use(name):
    module, _, attribute = name.rpartition(".")
    message = rf"^{name} of the original LLaVA is left out here; {LEFT_OUT[name][:20]}"
    with pytest.raises(ImportError, match=message):
        exec(f"from {module} import {attribute}", {})
    if attribute.islower() and attribute not in FUNCTIONS:
        with pytest.raises(ImportError, match=message):
            importlib.import_module(name)


def test_unknown_names_fail_as_ever():
    with pytest.raises(ImportError, match=r"^cannot import name 'spam' from 'llava\.utils'"):
        exec("from llava.utils import spam", {})
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'llava\.spam'$"):
        importlib.import_module("llava.spam")
    with pytest.raises(AttributeError, match="module 'llava' has no attribute 'spam'"):
        llava.spam  # noqa: B018
    assert importlib.util.find_spec("torch.spam") is None


def test_the_models_names_are_one_class():
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM as third

    from llava import LlavaLlamaForCausalLM as first
    from llava.model import LlavaLlamaForCausalLM as second
    from llava.model.llava_llama import LlavaLlamaForCausalLM

    assert first is second is third is LlavaLlamaForCausalLM


def test_the_finder_is_installed_once():
    install()
    assert sum(isinstance(finder, OriginalModules) for finder in sys.meta_path) == 1


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_importing_the_package_is_cheap():
    heavy = "{'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    result = run("-c", f"import sys, llava, llava.original_names; print(sorted({heavy}))")
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def test_the_first_import_of_a_process_may_be_any():
    """And it registers the model with transformers, as there."""
    code = (
        "import llava.model.language_model.llava_llama; from transformers import AutoConfig; "
        "print(AutoConfig.for_model('llava_llama').mm_projector_type)"
    )
    result = run("-c", code)
    assert (result.stdout, result.returncode) == ("linear\n", 0), result.stderr


def test_a_program_of_the_original_runs():
    result = run("-m", "llava.eval.model_vqa", "--help")
    assert result.returncode == 0, result.stderr
    assert "exit code: 0 all questions answered" in result.stdout
    result = run("-m", "llava.serve.controller")
    assert result.returncode == 1
    assert "llava.serve.controller of the original LLaVA is left out here; chat with" in result.stderr


def test_the_page_lists_every_name():
    page = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(llava[\w.]*)` \| (.*) \|$", page, re.MULTILINE))
    assert {module: set(re.findall(r"`(\w+)`", rows[module])) for module in MODULES if MODULES[module]} == {
        module: set(names) for module, names in MODULES.items() if names
    }
    for name, reason in LEFT_OUT.items():
        assert re.search(rf"^\|.*`{re.escape(name)}`.* \| {re.escape(reason)} \|$", page, re.MULTILINE), name
    options = [*HARMLESS, *LoadingOptions._fields]
    assert [option for option in options if f"`{option}`" not in page] == []
