"""Whole runs on a tiny model: trainable parameters, output files, resuming, and errors that stop a run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from llava.hub.model_card import is_untouched
from llava.model.builder import attach_adapter, build_model, load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.lazy_tensors import fingerprint
from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights
from llava.model.checkpoint.write_tensors import save_tensors, write_weights
from llava.train.train import main

SETTINGS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
]
LORA = ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"]
PROGRESS = ["manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]
LOGS = ["README.md", "loss.png", "train_log.jsonl", "trainer_state.json"]
IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png", "gray.jpg", "alpha.png"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def row(index, image=None):
    question = ("<image>\n" if image else "") + f"What number is {index}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": str(index)}]
    return {"id": index, "conversations": turns, **({"image": image} if image else {})}


ROWS = [*(row(index, name) for index, name in enumerate(IMAGES)), row(6), row(7)]
LORA_FLAGS = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-3"]


@pytest.fixture(scope="module")
def train(goldens, tmp_path_factory):
    """Return the function (output directory, *flags, rows=, base=) -> exit code of a run on the golden model."""

    def run(output, *flags, rows=ROWS, base=None, images=None):
        data = tmp_path_factory.mktemp("data") / "data.json"
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", base or goldens / "llava-v1.5-golden", "--data_path", data]
        words += ["--image_folder", images or goldens / "images", "--output_dir", output]
        words += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--learning_rate", "1e-3"]
        words += ["--save_strategy", "no", "--model_max_length", "256", *flags]
        return main([str(word) for word in words])

    return run


RESUMABLE = [*LORA_FLAGS, "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "3"]
RESUMABLE += ["--group_by_modality_length", "True", "--gradient_checkpointing", "True", "--evaluation_strategy", "no"]


@pytest.fixture(scope="module")
def lora_run(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "out"
    assert train(output, *RESUMABLE) == 0
    return output


def losses(output):
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def load(path, base=None, **options):
    return load_pretrained_model(str(path), base and str(base), "x", device="cpu", dtype="float32", **options)


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, images=images).logits


def test_listings(lora_run):
    assert names(lora_run) == sorted([*LORA, *SETTINGS, *LOGS, "checkpoint-3", "checkpoint-4"])
    for checkpoint in ("checkpoint-3", "checkpoint-4"):
        found = [name for name in names(lora_run / checkpoint) if name != "training_args.bin"]
        assert found == sorted([*LORA, *SETTINGS, *PROGRESS])


def test_what_is_recorded(goldens, lora_run):
    config = json.loads((lora_run / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["conversation_template"] == "vicuna_v1"
    assert config["image_aspect_ratio"] == "pad"
    assert config["tokenizer_model_max_length"] == 256
    assert config["mm_projector_lr"] == 1e-3
    assert config["base_model_name_or_path"] == str(goldens / "llava-v1.5-golden")
    assert config["base_model_fingerprint"] == fingerprint(open_weights(goldens / "llava-v1.5-golden"))
    assert config["use_cache"] is True
    assert json.loads((lora_run / "training.json").read_text())["TrainingArguments"]["lora_r"] == 4
    assert len(losses(lora_run)) == 4


def test_the_card_of_a_run(lora_run):
    card = ModelCard.load(lora_run / "README.md")
    manifest = json.loads((lora_run / "training.json").read_text())
    assert is_untouched(card.content)
    assert "LoRA adapter for" in card.text
    assert manifest["run"]["data_digest"] in card.text
    assert manifest["run"]["base_model_fingerprint"] in card.text
    assert "| `lora_r` | 4 |" in card.text
    assert "(loss.png)" in card.text
    assert str(lora_run.parent) not in card.content  # paths are nobody's business


def test_only_lora_and_projector_change(goldens, lora_run):
    adapter = open_tensor_file(lora_run / "adapter_model.safetensors")
    assert len(adapter) == 28
    assert all(".layers." in name and ("lora_A" in name or "lora_B" in name) for name in adapter)
    assert all(adapter[name].any() for name in adapter)
    others = open_tensor_file(lora_run / "non_lora_trainables.bin")
    base = open_weights(goldens / "llava-v1.5-golden")
    assert sorted(others) == [
        f"base_model.model.model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")
    ]
    for name in others:
        assert not torch.equal(others[name], base[name.removeprefix("base_model.model.")])
    merged = open_checkpoint(lora_run).tensors
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert {name for name in changed if "mm_projector" not in name} == {
        name for name in base if name.startswith("model.layers.") and name.endswith("proj.weight")
    }


@pytest.mark.parametrize("checkpoint", ["", "checkpoint-3", "checkpoint-4"])
def test_every_directory_loads_on_its_base(goldens, lora_run, checkpoint):
    model = load(lora_run / checkpoint)[1]
    bare = build_model(open_checkpoint(lora_run / checkpoint, with_adapter=False), dtype="float32", device="cpu")
    apart = attach_adapter(bare, lora_run / checkpoint)
    torch.testing.assert_close(logits(model), logits(apart), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(load(goldens / "llava-v1.5-golden")[1])).abs().max() > 1e-3


def test_the_last_checkpoint_is_the_result(lora_run):
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        final, last = (open_tensor_file(directory / name) for directory in (lora_run, lora_run / "checkpoint-4"))
        assert all(torch.equal(final[key], last[key]) for key in final)


def copy_without_result(source, target, *checkpoints):
    target.mkdir()
    for checkpoint in checkpoints:
        shutil.copytree(source / checkpoint, target / checkpoint)
    return target


def same_result(one, two):
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        left, right = open_tensor_file(one / name), open_tensor_file(two / name)
        assert sorted(left) == sorted(right)
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_a_run_that_is_resumed_equals_one_that_was_not_stopped(train, lora_run, tmp_path):
    output = copy_without_result(lora_run, tmp_path / "out", "checkpoint-3")
    assert train(output, *RESUMABLE) == 0
    assert len(losses(output)) == 1
    same_result(output, lora_run)
    assert names(output) == names(lora_run)


def test_a_half_written_checkpoint_is_passed_over(train, lora_run, tmp_path, caplog):
    output = copy_without_result(lora_run, tmp_path / "out", "checkpoint-3", "checkpoint-4")
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    assert train(output, *RESUMABLE) == 0
    same_result(output, lora_run)


def test_a_finished_run_writes_its_result_again(train, lora_run, tmp_path):
    output = copy_without_result(lora_run, tmp_path / "out", "checkpoint-4")
    assert train(output, *RESUMABLE) == 0
    same_result(output, lora_run)


def test_a_run_that_ended_within_an_epoch_ends_there_again(train, tmp_path):
    flags = [*RESUMABLE, "--max_steps", "3"]
    assert train(tmp_path / "whole", *flags) == 0
    output = copy_without_result(tmp_path / "whole", tmp_path / "out", "checkpoint-3")
    assert train(output, *flags) == 0
    assert losses(output) == []
    same_result(output, tmp_path / "whole")
    assert train(output, *RESUMABLE, "--max_steps", "4") == 0  # asked for more, it goes on
    assert len(losses(output)) == 1


def test_runs_repeat_bit_for_bit(train, lora_run, tmp_path):
    assert train(tmp_path / "out", *RESUMABLE) == 0
    same_result(tmp_path / "out", lora_run)


def test_accumulation_equals_a_larger_batch(train, tmp_path):
    common = [*LORA_FLAGS, "--lora_dropout", "0", "--num_train_epochs", "2", "--group_by_modality_length", "True"]
    assert train(tmp_path / "large", *common) == 0
    accumulated = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert train(tmp_path / "small", *common, *accumulated) == 0
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-5)
    one, two = (open_tensor_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("large", "small"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@pytest.fixture(scope="module")
def full_run(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("full") / "alone" / "out"
    assert train(output, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2") == 0
    return output


def test_full_finetuning_writes_a_directory_that_loads_alone(goldens, full_run):
    assert names(full_run) == sorted([*SETTINGS, *LOGS, "model.safetensors", "checkpoint-1", "checkpoint-2"])
    found = [name for name in names(full_run / "checkpoint-1") if name != "training_args.bin"]
    assert found == sorted([*SETTINGS, *PROGRESS, "model.safetensors"])
    _, model, processor, _ = load(full_run)
    assert processor.crop_size["height"] == 56
    golden, tensors = open_weights(goldens / "llava-v1.5-golden"), open_weights(full_run)
    assert sorted(tensors) == sorted(golden)
    assert {name for name in golden if torch.equal(golden[name], tensors[name])} == {
        name for name in golden if "vision_tower" in name
    }
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("precision", ["False", "True"], ids=["fp32", "bf16"])
def test_full_finetuning_resumes(train, tmp_path, precision):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--bf16", precision]
    assert train(tmp_path / "whole", *flags) == 0
    output = copy_without_result(tmp_path / "whole", tmp_path / "out", "checkpoint-1")
    assert train(output, *flags) == 0
    one, two = open_weights(tmp_path / "whole"), open_weights(output)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16 if precision == "True" else torch.float32}
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_frozen_parts_stay(train, goldens, tmp_path):
    golden = open_weights(goldens / "llava-v1.5-golden")
    assert train(tmp_path / "llm", "--freeze_mm_mlp_adapter", "True", "--max_steps", "1") == 0
    tensors = open_weights(tmp_path / "llm")
    assert torch.equal(tensors["model.mm_projector.0.weight"], golden["model.mm_projector.0.weight"])
    assert not torch.equal(tensors["lm_head.weight"], golden["lm_head.weight"])
    assert train(tmp_path / "projector", "--freeze_backbone", "True", "--max_steps", "1") == 0
    tensors = open_weights(tmp_path / "projector")
    changed = {name for name in golden if not torch.equal(tensors[name], golden[name])}
    assert changed == {f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")}


@pytest.fixture(scope="module")
def language_model(goldens, tmp_path_factory):
    """The golden's Llama alone, as Vicuna is released: no tower, no projector, no `mm_*` keys."""
    directory = tmp_path_factory.mktemp("models") / "vicuna"
    directory.mkdir()
    golden = open_weights(goldens / "llava-v1.5-golden")
    write_weights(golden.renamed(lambda name: None if "vision_tower" in name or "mm_" in name else name), directory)
    config = json.loads((goldens / "llava-v1.5-golden" / "config.json").read_text())
    config = {key: value for key, value in config.items() if "mm_" not in key and "image" not in key}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(goldens / "llava-v1.5-golden" / name, directory / name)
    return directory


def test_pretraining_writes_a_projector_that_loads_on_its_base(train, goldens, language_model, tmp_path):
    flags = ["--tune_mm_mlp_adapter", "True", "--version", "plain", "--mm_projector_type", "mlp2x_gelu"]
    flags += ["--vision_tower", str(goldens / "clip-vit-tiny-patch14-56")]
    output = tmp_path / "projector"
    assert train(output, *flags, rows=ROWS[:6], base=language_model) == 0
    assert names(output) == sorted([*SETTINGS, *LOGS, "mm_projector.bin"])
    tensors = open_tensor_file(output / "mm_projector.bin")
    assert sorted(tensors) == [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    _, model, processor, _ = load(output, language_model)
    assert model.config.conversation_template == "plain"
    assert processor.crop_size["height"] == 56
    assert torch.equal(model.get_model().mm_projector[0].weight, tensors["model.mm_projector.0.weight"])
    # and the next stage starts from it
    flags = [*LORA_FLAGS, "--version", "v1", "--pretrain_mm_mlp_adapter", str(output / "mm_projector.bin")]
    flags += ["--vision_tower", str(goldens / "clip-vit-tiny-patch14-56"), "--max_steps", "1"]
    assert train(tmp_path / "lora", *flags, base=language_model) == 0
    model = load(tmp_path / "lora", language_model)[1]
    assert model.config.conversation_template == "v1"
    assert model.config.image_aspect_ratio == "pad"
    assert logits(model).shape == (1, 20, 32000)


def test_a_hub_id_is_looked_up_in_the_cache_asked_for(train, goldens, tmp_path):
    snapshot = tmp_path / "cache" / "models--tiny--llava" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(goldens / "llava-v1.5-golden", snapshot)
    shutil.copytree(goldens / "clip-vit-tiny-patch14-56", snapshot.parent / "clip-vit-tiny-patch14-56")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    flags = [*LORA_FLAGS, "--cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]
    assert train(tmp_path / "out", *flags, base="tiny/llava") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llava"


def test_text_alone(train, tmp_path):
    assert (
        train(tmp_path / "out", *LORA_FLAGS, "--group_by_modality_length", "True", rows=[row(1), row(2), row(3)]) == 0
    )
    others = open_tensor_file(tmp_path / "out" / "non_lora_trainables.bin")
    assert len(others) == 4


def test_adapters_are_trained_further(train, lora_run, tmp_path):
    flags = [*LORA_FLAGS, "--lora_weight_path", str(lora_run), "--max_steps", "1"]
    assert train(tmp_path / "still", *flags, "--learning_rate", "0", "--mm_projector_lr", "0") == 0
    same_result(tmp_path / "still", lora_run)
    assert train(tmp_path / "further", *flags) == 0
    before, after = (open_tensor_file(path / "adapter_model.safetensors") for path in (lora_run, tmp_path / "further"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_run_summary_is_printed(train, tmp_path, capsys):
    assert train(tmp_path / "out", *LORA_FLAGS, "--max_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "template              vicuna_v1" in printed
    assert "image aspect ratio    pad" in printed
    assert "rows                  8, 6 images" in printed
    assert "[[0</s>]]" in printed


def failure(capsys, code, expected_code=1):
    assert code == expected_code
    return capsys.readouterr().err


def test_bad_rows_are_listed_and_nothing_is_written(train, tmp_path, capsys):
    rows = [row(0, "gone.jpg"), row(1), {"id": 2}, row(3, "../x.jpg")]
    message = failure(capsys, train(tmp_path / "out", *LORA_FLAGS, rows=rows))
    assert message.startswith("error: ")
    assert "data.json: 3 of 4 rows can't be used\n  row 0: image 'gone.jpg' not found under" in message
    assert "\n  row 2: not a record: " in message
    assert "\n  row 3: image '../x.jpg' leads out of the image folder" in message
    assert message.endswith("fix these rows, or pass --on_bad_row skip\n")
    assert not (tmp_path / "out" / "config.json").exists()


def test_bad_rows_are_left_out_on_request(train, tmp_path, caplog):
    rows = [row(0, "gone.jpg"), *ROWS]
    with caplog.at_level("WARNING"):
        assert train(tmp_path / "out", *LORA_FLAGS, "--on_bad_row", "skip", "--max_steps", "1", rows=rows) == 0
    assert "1 of 9 rows can't be used" in caplog.text
    assert "they are left out" in caplog.text


def test_no_good_row_is_left(train, tmp_path, capsys):
    message = failure(capsys, train(tmp_path / "o", *LORA_FLAGS, "--on_bad_row", "skip", rows=[row(0, "gone.jpg")]))
    assert "1 of 1 rows can't be used" in message


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_met_in_training_is_named(train, goldens, tmp_path, capsys, workers):
    (tmp_path / "images").mkdir()
    content = (goldens / "images" / "landscape.jpg").read_bytes()
    (tmp_path / "images" / "half.jpg").write_bytes(content[: len(content) // 2])
    flags = [*LORA_FLAGS, "--dataloader_num_workers", workers, "--skip_data_check", "True"]
    code = train(tmp_path / "out", *flags, rows=[row(0, "half.jpg")], images=tmp_path / "images")
    message = failure(capsys, code)
    assert "half.jpg can't be decoded" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mm_projector_type", "linear"],
            "--mm_projector_type linear: the checkpoint has mlp2x_gelu; leave the flag",
        ),
        (["--mm_vision_select_layer", "-1"], "--mm_vision_select_layer -1: the checkpoint has -2; leave the flag out"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_flags_that_contradict_the_checkpoint(train, tmp_path, capsys, flags, message):
    assert message in failure(capsys, train(tmp_path / "out", *LORA_FLAGS, *flags))


def test_another_template_than_the_checkpoints(train, lora_run, full_run, tmp_path, capsys):
    message = failure(capsys, train(tmp_path / "out", "--version", "llava_llama_2", base=full_run))
    assert "error: --version llava_llama_2: the checkpoint was trained with vicuna_v1; leave the flag out" in message


def test_a_lora_directory_is_not_a_base(train, lora_run, tmp_path, capsys):
    message = failure(capsys, train(tmp_path / "out", *LORA_FLAGS, base=lora_run))
    assert f"error: --model_name_or_path {lora_run} holds a LoRA adapter; merge it first with" in message


def test_adapters_of_another_base_are_not_trained_further(train, lora_run, full_run, tmp_path, capsys):
    flags = [*LORA_FLAGS, "--lora_weight_path", str(lora_run)]
    message = failure(capsys, train(tmp_path / "out", *flags, base=full_run))
    assert f"error: {lora_run} was trained on" in message
    assert f"but {full_run} has fingerprint" in message


def test_adapters_outside_the_llm_are_merged_into_their_weights(train, goldens, lora_run, tmp_path, caplog):
    """A step of rate 0 changes nothing: what the encoder's adapter does is in the result too, though frozen."""
    shutil.copytree(lora_run, tmp_path / "odd", ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = dict(open_tensor_file(tmp_path / "odd" / "adapter_model.safetensors"))
    layer = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}
    save_tensors(tensors, tmp_path / "odd" / "adapter_model.safetensors")
    flags = [*LORA_FLAGS, "--lora_weight_path", str(tmp_path / "odd"), "--max_steps", "1"]
    assert train(tmp_path / "out", *flags, "--learning_rate", "0", "--mm_projector_lr", "0") == 0
    assert "1 adapters of" in caplog.text
    assert f"are outside the LLM's blocks ({layer.removeprefix('base_model.model.')}.weight first)" in caplog.text
    expected = logits(load(tmp_path / "odd", goldens / "llava-v1.5-golden")[1])
    torch.testing.assert_close(logits(load(tmp_path / "out")[1]), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(load(lora_run)[1])).abs().max() > 1e-3


def test_a_frozen_projector_is_in_the_result(train, goldens, lora_run, tmp_path):
    """The base's, or that of the adapter the run went on from; an empty file would be no result."""
    frozen = [*LORA_FLAGS, "--freeze_mm_mlp_adapter", "True", "--max_steps", "1"]
    assert train(tmp_path / "new", *frozen) == 0
    found = open_tensor_file(tmp_path / "new" / "non_lora_trainables.bin")
    golden = open_weights(goldens / "llava-v1.5-golden")
    name = "model.mm_projector.0.weight"
    assert torch.equal(found[f"base_model.model.{name}"], golden[name])
    assert train(tmp_path / "further", *frozen, "--lora_weight_path", str(lora_run)) == 0
    found = open_tensor_file(tmp_path / "further" / "non_lora_trainables.bin")
    trained = open_tensor_file(lora_run / "non_lora_trainables.bin")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[key], trained[key]) for key in trained)
    assert not torch.equal(trained[f"base_model.model.{name}"], golden[name])


def test_an_llm_needs_a_tower(train, language_model, tmp_path, capsys):
    message = failure(capsys, train(tmp_path / "out", *LORA_FLAGS, base=language_model))
    assert f"error: {language_model} has no vision tower; pass --vision_tower with its directory" in message


def test_wrong_flags_end_with_two(train, tmp_path, capsys):
    message = failure(capsys, train(tmp_path / "out", "--no_such_flag", "1"), expected_code=2)
    assert message.startswith("error: unknown flag --no_such_flag")
    message = failure(capsys, train(tmp_path / "out", "--bits", "5"), expected_code=2)
    assert message == "error: --bits 5: choose 4, 8 or 16; --bits 5 holds the LLM frozen; add --lora_enable True\n"


def test_missing_data(goldens, tmp_path, capsys):
    words = ["--model_name_or_path", str(goldens / "llava-v1.5-golden"), "--output_dir", str(tmp_path / "out")]
    words += ["--data_path", str(tmp_path / "none.json"), "--use_cpu", "True", "--report_to", "none"]
    message = failure(capsys, main(words))
    assert "none.json not found; make it with task_data_preprocessing.py or pass --data_path" in message
