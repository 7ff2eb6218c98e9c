"""Training on packs equals training on separate rows; compilation, padded lengths, log."""

from __future__ import annotations

import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.clip_image_processor import CLIPPixels
from llava.data.dataset import ImageSettings, SupervisedCollator
from llava.data.packed_dataset import PackCollator
from llava.data.packing import padded_length
from llava.data.prefix_sampler import SharedPrefixSampler, find_sharing
from llava.data.records import EncodedRecord
from llava.model.capabilities import choose
from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.model.configuration import features_per_image
from llava.model.memory import StepLoad
from llava.train.lora import add_lora, choose_trainable
from llava.train.packing_setup import (
    LayerExecution,
    build_loader,
    choose_execution,
    describe_execution,
    describe_sharing,
    few_lengths,
    plan_batches,
    prepare_model,
)
from llava.train.train import main

LORA_FLAGS = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
__, IMAGE = -100, -200


def row(index, image, *further):
    turns = [{"from": "human", "value": f"<image>\nWhat number is {index}?" if image else f"Say {index}."}]
    turns += [{"from": "gpt", "value": str(index)}]
    for question in further:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": index, "conversations": turns, **({"image": image} if image else {})}


ROWS = [row(index, "portrait.png") for index in range(4)]
ROWS += [row(4, "square.png"), row(5, "square.png", "Is it more than 3?"), row(6, "gray.jpg"), row(7, None)]


@pytest.fixture(scope="module")
def train(goldens, tmp_path_factory):
    """Return the function (output directory, *flags) -> exit code of a run on the golden model."""
    data = tmp_path_factory.mktemp("data") / "data.json"
    data.write_text(json.dumps(ROWS))

    def run(output, *flags):
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", data, "--output_dir", output]
        words += ["--image_folder", goldens / "images", "--use_cpu", "True", "--report_to", "none"]
        words += ["--disable_tqdm", "True", "--logging_steps", "1", "--learning_rate", "1e-3", "--save_strategy", "no"]
        words += ["--model_max_length", "256", "--per_device_train_batch_size", "8", *flags]
        return main([str(word) for word in words])

    return run


def losses(output):
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


KINDS = {
    "lora": LORA_FLAGS,
    "full": [],
    "projector": ["--tune_mm_mlp_adapter", "True"],
    "checkpointing": [*LORA_FLAGS, "--gradient_checkpointing", "True"],
    "fused": [*LORA_FLAGS, "--fuse_lora", "on", "--compile_layers", "off"],
    "fused checkpointing": [*LORA_FLAGS, "--fuse_lora", "on", "--gradient_checkpointing", "True"],
    "accumulation": [*LORA_FLAGS, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_shared_and_unshared_runs_have_the_same_losses(train, tmp_path, kind):
    """All rows are in each step, so that the order within it makes no difference."""
    flags = [*KINDS[kind], "--num_train_epochs", "4"]
    assert train(tmp_path / "shared", *flags) == 0
    assert train(tmp_path / "apart", *flags, "--share_image_prefix", "False") == 0
    assert len(losses(tmp_path / "apart")) == 4
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "apart"), rel=1e-6, abs=0)


def test_shared_and_unshared_runs_of_a_quantized_llm(train_tiny, tmp_path):
    flags = [*LORA_FLAGS, "--bits", "4", "--max_steps", "3", "--per_device_train_batch_size", "8"]
    assert train_tiny(tmp_path / "shared", ROWS, *flags) == 0
    assert train_tiny(tmp_path / "apart", ROWS, *flags, "--share_image_prefix", "False") == 0
    assert len(losses(tmp_path / "apart")) == 3
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "apart"), rel=1e-5, abs=0)


def test_a_run_over_packs_that_is_resumed_equals_one_that_was_not_stopped(train, tmp_path):
    flags = [*LORA_FLAGS, "--lora_dropout", "0.1", "--num_train_epochs", "2", "--per_device_train_batch_size", "3"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--dataloader_num_workers", "1"]
    assert train(tmp_path / "whole", *flags) == 0
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")  # in the middle of an epoch of 3
    assert train(tmp_path / "again", *flags) == 0
    one, two = (open_tensor_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_log_says_what_is_saved(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert train(tmp_path / "out", *LORA_FLAGS, "--max_steps", "1") == 0
    assert "image prefix: 6 of 8 rows share 2 prefixes; " in caplog.text
    assert "times fewer" in caplog.text


DENSE = LayerExecution(in_blocks=False, compiled=False)


def question(image, *words):
    return EncodedRecord([1, IMAGE, *words, 2], [__] * (2 + len(words)) + [2], [image])


def test_the_log_line_about_shared_prefixes():
    records = [question("a", 5, 6), question("a", 7, 6), question("b", 8, 6)]
    sharing = find_sharing(records, [100, 100, 100])
    assert describe_sharing(sharing, [100, 100, 100], [100, 105], 2) == (
        "image prefix: 2 of 3 rows share 1 prefixes; 205 positions an epoch instead of 300, 1.46 times fewer; "
        "2.4 % of the processes' time spent waiting for the largest"
    )
    assert "waiting" not in describe_sharing(sharing, [100, 100, 100], [205], 1)
    apart = find_sharing(records[1:], [100, 100])
    assert describe_sharing(apart, [100, 100], [200], 1) == (
        "image prefix: no two of 2 rows share one; 200 positions an epoch"
    )


def arguments(**changes):
    flags = {"share_image_prefix": True, "compile_layers": "auto", "bits": 16, "deepspeed": None, "seed": 0}
    flags |= {
        "base_dtype": "auto",
        "fuse_lora": "auto",
        "fsdp": [],
        "device": torch.device("cpu"),
        "train_batch_size": 2,
        "world_size": 1,
        "model_max_length": 64,
    }
    return SimpleNamespace(**(flags | changes))


def feed(records, execution=DENSE, **changes):
    plan = plan_batches(records, 4, arguments(**changes))
    return build_loader(plan, CLIPPixels(2), ImageSettings("pad"), 0, arguments(**changes), execution)


def test_the_planner_is_given_the_packs_that_are_trained_on():
    records = [question("a", 5), question("a", 6), question("b", 5)]
    plan = plan_batches(records, 4, arguments(train_batch_size=3))
    assert plan.costs == plan.workload.costs(3) == [15]  # system prefix 1, 4 + 2 + 2, 4 + 2
    assert plan.sampler.order() == plan.workload.order(3)
    assert plan.workload.largest(3, budget=8) == StepLoad(positions=18, images=2, predicted=64, masked_length=9)
    rows = plan_batches(records, 4, arguments(train_batch_size=3, share_image_prefix=False)).workload
    assert rows.largest(3) == StepLoad(positions=21, images=3, predicted=21)


def test_dataset_collator_and_sampler(tmp_path):
    together, apart = [question("a", 5), question("a", 6)], [question("a", 5), question("b", 6)]
    assert isinstance(feed(together).sampler, SharedPrefixSampler)
    assert isinstance(feed(together).collator, PackCollator)
    assert feed(apart).sampler is None  # the trainer's own order
    assert isinstance(feed(apart).collator, PackCollator)
    assert isinstance(feed(together, share_image_prefix=False).collator, SupervisedCollator)
    collator = feed(together).collator
    assert (collator.budget, collator.multiple) == (64, 1)
    assert feed(together).positions == 9
    collator = feed(together, LayerExecution(in_blocks=True, compiled=False)).collator
    assert (collator.budget, collator.multiple) == (None, 128)
    compiled = feed(together, LayerExecution(in_blocks=True, compiled=True))
    assert (compiled.collator.lengths, compiled.collator.multiple, compiled.positions) == ([128], 1024, 128)
    assert feed(together * 40, LayerExecution(in_blocks=False, compiled=True)).collator.lengths == [128]  # rows of 64
    assert feed(together, share_image_prefix=False).positions == 14


def test_few_lengths():
    assert few_lengths([100, 200, 300]) == [128, 256, 384]
    assert few_lengths([5000]) == [5120]
    clusters = [700, *range(2040, 2060), *range(2600, 2660), *range(3180, 3200), 5000]
    assert few_lengths(clusters) == [2176, 2688, 3200, 5120]  # the one short pack is not worth a length


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=30))
@settings(deadline=None)
def test_no_other_lengths_pad_less(costs):
    sizes = sorted({-(-cost // 128) * 128 for cost in costs})

    def padded(lengths):
        return sum(padded_length(cost, 128, lengths) for cost in costs)

    choices = [choice for count in range(1, 5) for choice in itertools.combinations(sizes, count)]
    best = min(padded(choice) for choice in choices if choice[-1] == sizes[-1])
    chosen = few_lengths(costs)
    assert len(chosen) <= 4
    assert padded(chosen) == best


@pytest.mark.parametrize(
    ("changes", "compiles"),
    [
        ({"compile_layers": "on"}, True),
        ({}, False),
        ({"device": torch.device("cuda")}, True),
        ({"device": torch.device("cuda"), "bits": 4}, False),
        ({"device": torch.device("cuda"), "compile_layers": "off"}, False),
        ({"device": torch.device("cuda"), "deepspeed": {"zero_optimization": {"stage": 3}}}, False),
        ({"device": torch.device("cuda"), "fsdp": ["full_shard"]}, False),
        ({"device": torch.device("cuda"), "share_image_prefix": False}, False),
    ],
)
def test_when_layers_are_compiled(tiny_packed_model, pretend_gpu, changes, compiles):
    pretend_gpu((9, 0))
    model = tiny_packed_model(num_attention_heads=1, num_key_value_heads=1)  # 16 wide, as FlexAttention needs at least
    assert prepare_model(model, arguments(**changes)).compiled is compiles
    assert model.has_compiled_layers is compiles
    changes = {**arguments(**changes).__dict__}
    assert model.has_flex_attention is (changes["device"].type == "cuda" and changes["share_image_prefix"])


def test_heads_that_flex_attention_does_not_take_have_a_dense_mask(tiny_packed_model, pretend_gpu):
    pretend_gpu((9, 0))
    model = tiny_packed_model()  # 8 wide
    assert prepare_model(model, arguments(device=torch.device("cuda"))) == LayerExecution(
        in_blocks=False, compiled=False
    )
    assert not model.has_flex_attention


CUDA = torch.device("cuda")
FLEX_AND_COMPILED, DENSE_ALONE = LayerExecution(True, True), LayerExecution(False, False)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        *(((major, minor), DENSE_ALONE) for major, minor in [(6, 1), (7, 0), (7, 5)]),
        *(((major, minor), FLEX_AND_COMPILED) for major, minor in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    ],
)
def test_execution_by_generation(pretend_gpu, capability, expected):
    can = choose(pretend_gpu(capability))
    flags = arguments(device=CUDA)
    assert choose_execution(can, 128, flags) == expected
    assert choose_execution(can, 80, flags) == DENSE_ALONE  # FlexAttention takes powers of 2
    assert choose_execution(can, 256, flags) == DENSE_ALONE  # and consumer GPUs no more than 128
    assert choose_execution(can, 128, arguments(device=CUDA, compile_layers="off")).compiled is False
    assert choose_execution(choose(pretend_gpu(capability, installed=[])), 128, flags) == DENSE_ALONE


@pytest.mark.parametrize(
    ("capability", "changes", "line"),
    [
        (
            (7, 5),
            {"fp16": True, "weight_dtype": torch.float16},
            "GPU (compute capability 7.5, Turing): fp16, SDPA, loss scaling, dense packs, no compilation, no Triton "
            "kernels (Triton needs compute capability 8.0)",
        ),
        (
            (8, 6),
            {},
            "GPU (compute capability 8.6, Ampere): bf16, SDPA, FlexAttention packs, compilation, Triton kernels",
        ),
        (
            (8, 6),
            {"bits": 4},
            "GPU (compute capability 8.6, Ampere): bf16, SDPA, FlexAttention packs, no compilation, no Triton kernels",
        ),
        (
            (12, 0),
            {"share_image_prefix": False, "weight_dtype": torch.float32},
            "GPU (compute capability 12.0, Blackwell): fp32, SDPA, no compilation, no Triton kernels",
        ),
    ],
)
def test_the_line_that_training_starts_with(pretend_gpu, capability, changes, line):
    flags = arguments(device=CUDA, **{"fp16": False, "weight_dtype": torch.bfloat16, **changes})
    assert describe_execution(choose(pretend_gpu(capability)), 128, flags) == line


@torch.no_grad()
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=["dense", "FlexAttention"])
def test_packs_of_every_generation_have_the_loss_of_separate_records(tiny_packed_model, pretend_gpu, capability):
    """Gradients are compared in `tests/model/packed`: FlexAttention's backward pass needs a GPU."""
    pretend_gpu(capability)
    model = tiny_packed_model(num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=256).double()
    images = [torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0)).double()]
    records = [question("a", 5, 6), question("a", 5, 7, 8), question("a", 9)]
    rows = [SimpleNamespace(record=record, images=images) for record in records]
    separate = [model(**PackCollator(4, 28, budget=None, multiple=1)([row])).loss for row in rows]
    execution = prepare_model(model, arguments(device=CUDA, compile_layers="off"))
    assert execution.in_blocks is model.has_flex_attention is (capability >= (8, 0))
    pack = PackCollator(4, 28, budget=None, multiple=128 if execution.in_blocks else 1)(rows)
    with torch.compiler.set_stance("force_eager"):  # FlexAttention uncompiled, so that no compiler is needed here
        together = model(**pack).loss
    torch.testing.assert_close(together, torch.stack(separate).mean(), rtol=1e-7, atol=0)  # a token supervised in each


def with_adapters(model, **changes):
    options = {"rank": 3, "alpha": 6, "dropout": 0.0, "bias": "none", "base_name": "tiny"}
    wrapped = add_lora(model, **(options | changes))
    choose_trainable(wrapped, lora=True, projector=True, backbone=False)
    return wrapped


def test_when_adapters_are_fused(tiny_packed_model):
    model = tiny_packed_model()
    prepare_model(with_adapters(model), arguments(compile_layers="on"))
    assert model.fused_lora is not None
    for changes in ({}, {"compile_layers": "on", "fuse_lora": "off"}):
        model = tiny_packed_model()
        prepare_model(with_adapters(model), arguments(**changes))
        assert model.fused_lora is None
    model = tiny_packed_model()
    prepare_model(model, arguments(compile_layers="on"))  # no adapters, so compiled as they are
    assert model.fused_lora is None
    assert model.has_compiled_layers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "there are no adapters"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "the weights are partitioned"),
    ],
)
def test_fuse_lora_on_that_is_impossible(tiny_packed_model, changes, reason):
    with pytest.raises(ValueError, match=f"--fuse_lora on: {reason}; leave it out"):
        prepare_model(tiny_packed_model(), arguments(fuse_lora="on", **changes))


def test_layers_are_compiled_once_for_packs_alone(tiny_packed_model):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_packed_model(num_hidden_layers=4).train()
    collator = PackCollator(4, 28, budget=None, multiple=8)
    rows = [SimpleNamespace(record=question("a", 5, 6), images=[torch.zeros(3, 28, 28)])] * 2
    expected = model(**collator(rows)).loss
    model.compile_layers(backend=count)
    torch._dynamo.reset()
    torch.testing.assert_close(model(**collator(rows)).loss, expected)
    assert len(graphs) == 1  # for four layers
    model(input_ids=torch.tensor([[1, 5, 6]]))
    model(input_ids=torch.tensor([[1, 5, 6, 7]]))
    assert len(graphs) == 1


def test_positions_of_an_image(tiny_packed_model):
    config = tiny_packed_model().config
    assert features_per_image(config, config.mm_vision_config) == 4
    config.mm_vision_select_feature = "cls_patch"
    assert features_per_image(config, config.mm_vision_config) == 5
