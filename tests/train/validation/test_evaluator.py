"""Validation is correct, independent of batches and ranks, and leaves training unchanged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from llava.constants import IGNORE_INDEX
from llava.conversation import get_template
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.records import EncodedRecord
from llava.data.supervision import encode_example
from llava.data.vqa_normalize import normalize_answer
from llava.image_files.decode import open_image
from llava.inference.engine.engine import Engine
from llava.inference.session import Prompt, Sampling, Session
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.train.validation.evaluator import (
    Evaluator,
    accuracies,
    answer_type,
    choose_questions,
    eval_mode,
    find_questions,
    hold_out,
    rows_of_rank,
    supervised_spans,
    warn_of_shared_images,
)
from llava.train.validation.packed_evaluator import rows_by_image

COLORS = {"landscape.jpg": "yellow", "portrait.png": "green", "square.png": "red", "gray.jpg": "three"}
LORA = ["--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16"]


def row(image, answer, question="What color is it?"):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": answer, "image": image, "conversations": turns}


ROWS = [row(image, answer) for image, answer in COLORS.items()]
DIALOGUE = {
    "id": "two turns",
    "image": "wide.png",
    "conversations": [
        *row("", "yes", "Is it a thing?")["conversations"],
        {"from": "human", "value": "How many are there?"},
        {"from": "gpt", "value": "There are two"},
    ],
}
TEXT = {"id": "text", "conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "No."}]}
HELD_OUT = [ROWS[0], DIALOGUE, TEXT]


@pytest.fixture
def held_out(tmp_path):
    """Return the function rows -> flags that validate on them at every second step."""

    def write(rows=HELD_OUT):
        (tmp_path / "held_out.json").write_text(json.dumps(rows))
        return ["--eval_data_path", tmp_path / "held_out.json", "--eval_strategy", "steps", "--eval_steps", "2"]

    return write


# questions


class Stub:
    """A session whose answers are given."""

    def __init__(self, answers=()):
        self.answers, self.asked, self.model = list(answers), [], nn.Linear(1, 1)
        self.model.device = torch.device("cpu")

    def answer_prompts(self, prompts, sampling):
        self.asked += prompts
        return [self.answers.pop(0) for _ in prompts]


@pytest.fixture
def session(golden_model):
    tokenizer, model, processor, _ = golden_model
    return Session(tokenizer, model, processor, get_template("vicuna_v1"), 512)


def encoded(record, tokenizer):
    ids, labels = encode_example(record["conversations"], "vicuna_v1", tokenizer)
    return EncodedRecord(ids, labels, [Path(record["image"])] if "image" in record else [])


def test_each_turn_is_a_question_with_the_turns_before_it(session):
    questions = find_questions([encoded(DIALOGUE, session.tokenizer), encoded(TEXT, session.tokenizer)], session)
    assert [question.answer for question in questions] == ["yes", "There are two", "No."]
    first, second, third = (question.prompt for question in questions)
    assert first.input_ids == session.prompt_ids("Is it a thing?", 1)  # as inference asks
    assert third.input_ids == session.prompt_ids("Say it.", 0)
    assert second.input_ids[: len(first.input_ids)] == first.input_ids
    assert session.tokenizer.decode(second.input_ids[-20:]).endswith("yes</s>USER: How many are there? ASSISTANT:")
    assert [question.prompt.images for question in questions] == [[Path("wide.png")], [Path("wide.png")], []]
    assert all(set(question.prompt.labels) == {IGNORE_INDEX} for question in questions)


def test_supervised_spans():
    ignored = IGNORE_INDEX
    assert supervised_spans([ignored, 5, 6, ignored, ignored, 7]) == [(1, 3), (5, 6)]
    assert supervised_spans([1, 2]) == [(0, 2)]
    assert supervised_spans([ignored]) == supervised_spans([]) == []


def test_long_answers_are_left_out_and_the_log_says_so(session, caplog):
    questions = find_questions([encoded(DIALOGUE, session.tokenizer), encoded(TEXT, session.tokenizer)], session)
    with caplog.at_level(logging.INFO, "llava"):
        chosen = choose_questions(questions, 1000, 3)
    assert {question.answer for question in chosen} == {"yes", "No."}
    assert caplog.messages == [
        "accuracy leaves out 1 of 3 questions, whose answers are longer than --eval_max_new_tokens 3"
    ]


def test_the_same_questions_are_chosen_every_time(session):
    records = [encoded(row("a.jpg", str(index)), session.tokenizer) for index in range(30)]
    questions = find_questions(records, session)
    chosen = choose_questions(questions, 10, 64)
    assert len(chosen) == len({question.answer for question in chosen}) == 10
    assert choose_questions(questions, 10, 64) == chosen
    assert {question.answer for question in choose_questions(questions, 5, 64)} < {row.answer for row in chosen}
    assert choose_questions(questions, 0, 64) == []


# accuracy


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("Yes", "yes_no"), ("no.", "yes_no"), ("2", "number"), ("two", "number"), ("1,000", "number"), ("a cat", "other")],
)
def test_answer_types(answer, kind):
    assert answer_type(answer) == kind


def test_accuracy_against_a_count_by_hand():
    """Right: "Yes." for yes, "two" for 2, "a dog" for dog; wrong: no for yes, 3 for 2."""
    true = ["yes", "yes", "2", "2", "the dog"]
    given = ["Yes.", "no", "two", "3", "a dog"]
    prompt = EncodedRecord([1, 5], [IGNORE_INDEX] * 2, [])
    evaluator = make_evaluator(Stub(given), [(prompt, answer, 2) for answer in true])
    right, asked = evaluator._count(evaluator._answers(0, 1))
    assert dict(asked) == {"yes_no": 2, "number": 2, "other": 1}
    assert dict(right) == {"yes_no": 1, "number": 1, "other": 1}
    measured = accuracies([right[kind] for kind in asked], [asked[kind] for kind in asked])
    assert measured == {
        "accuracy": 3 / 5,
        "accuracy_yes_no": 1 / 2,
        "accuracy_number": 1 / 2,
        "accuracy_other": 1,
        "questions": 5,
    }
    assert accuracies([0, 0, 0], [0, 0, 0]) == {}
    assert accuracies([0, 0, 2], [0, 0, 4]) == {"accuracy": 0.5, "accuracy_other": 0.5, "questions": 4}


def make_evaluator(session, questions, rows=(), batch_size=2):
    from llava.train.validation.evaluator import ValidationQuestion

    asked = [ValidationQuestion(*question) for question in questions]
    settings = ImageSettings("pad")
    return Evaluator(
        rows=SupervisedDataset(rows, None, settings, 1),
        collator=SupervisedCollator(0, 28),
        questions=asked,
        prompts=SupervisedDataset([question.prompt for question in asked], None, settings, 1),
        session=session,
        max_new_tokens=4,
        batch_size=batch_size,
        workers=0,
    )


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_ranks_together_get_each_row_once_in_equal_numbers(count, processes):
    shares = [rows_of_rank(count, rank, processes) for rank in range(processes)]
    assert sorted(row for share in shares for row in share.rows[: share.counted]) == list(range(count))
    assert len({len(share.rows) for share in shares}) == 1


def test_padding_questions_are_answered_but_do_not_count():
    prompt = EncodedRecord([1, 5], [IGNORE_INDEX] * 2, [])
    session = Stub(["no"])
    assert list(make_evaluator(session, [(prompt, "yes", 1)])._answers(1, 2)) == []
    assert len(session.asked) == 1


def test_text_only_questions_bring_a_blank_image():
    """So that under ZeRO-3 the encoder runs in every process."""
    prompt = EncodedRecord([1, 5], [IGNORE_INDEX] * 2, [])
    session = Stub(["no", "no"])
    list(make_evaluator(session, [(prompt, "yes", 1)] * 2)._answers(0, 1))
    assert [len(asked.pixel_values) for asked in session.asked] == [1, 0]
    assert session.asked[0].pixel_values[0].shape == (3, 28, 28)


# data


def test_no_image_on_both_sides():
    records = [EncodedRecord([index], [index], [Path(f"folder/{index % 7}.jpg")]) for index in range(40)]
    records += [EncodedRecord([100, index % 3], [1], []) for index in range(9)]
    training, validation = hold_out(records, 0.3, 0)
    assert sorted([*training, *validation]) == sorted(records)
    sides = [
        {(*record.images, *(() if record.images else record.input_ids)) for record in side}
        for side in (training, validation)
    ]
    assert len(sides[1]) == 3
    assert not sides[0] & sides[1]


def test_images_on_both_sides_are_counted(caplog):
    records = [EncodedRecord([1], [1], [Path(name)]) for name in ("a", "b", "c")]
    warn_of_shared_images(records[:2], records[2:])
    assert caplog.messages == []
    warn_of_shared_images(records[:2], records[1:])
    assert caplog.messages[0].startswith("1 of 2 images of --eval_data_path are in --data_path too; validation will")


# nothing is disturbed


def test_modes_and_random_generators_are_restored():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout())
    model[0].eval()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with pytest.raises(KeyError), eval_mode(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model] == [False, True, True]
    assert torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [[*LORA, "--lora_dropout", "0.3"], ["--gradient_checkpointing", "True"], [*LORA, "--bits", "4"]],
    ids=["lora with dropout", "full with gradient checkpointing", "qlora"],
)
def test_training_is_the_same_with_and_without(train_tiny, read_log, held_out, tmp_path, flags):
    """Losses and weights, bit for bit."""
    words = ["--per_device_train_batch_size", "2", "--num_train_epochs", "2", "--learning_rate", "1e-3", *flags]
    words += ["--eval_max_new_tokens", "4"]
    assert train_tiny(tmp_path / "without", ROWS, *words) == 0
    assert train_tiny(tmp_path / "with", ROWS, *words, *held_out()) == 0
    assert len(read_log(tmp_path / "with", "eval_loss")) == 2
    assert read_log(tmp_path / "with", "loss") == read_log(tmp_path / "without", "loss")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin", "model.safetensors"):
        if (tmp_path / "with" / name).exists():
            one, two = (open_tensor_file(tmp_path / kind / name) for kind in ("with", "without"))
            assert all(torch.equal(one[key], two[key]) for key in one)


# whole runs


@pytest.fixture(scope="module")
def learnt(train_tiny, tmp_path_factory):
    """A run that overfits the rows, validated on a trained row and two others."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "held_out.json").write_text(json.dumps(HELD_OUT))
    flags = ["--per_device_train_batch_size", "4", "--num_train_epochs", "14", "--learning_rate", "5e-3", *LORA]
    flags += ["--eval_data_path", folder / "held_out.json", "--eval_strategy", "steps", "--eval_steps", "4"]
    flags += ["--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2"]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_accuracy"]
    assert train_tiny(folder / "out", ROWS, *flags, "--per_device_eval_batch_size", "2") == 0
    return folder / "out"


@pytest.mark.slow
def test_what_is_logged(learnt, read_log):
    assert len(read_log(learnt, "eval_loss")) == 4  # after steps 4, 8, 12, and at the end
    for key in ("eval_accuracy", "eval_accuracy_yes_no", "eval_accuracy_number", "eval_accuracy_other"):
        values = read_log(learnt, key)
        assert len(values) == (0 if key == "eval_accuracy_number" else 4)
    assert read_log(learnt, "eval_questions") == [4] * 4
    assert read_log(learnt, "eval_accuracy_other")[-1] >= 0.5  # the row that was trained on
    assert all(value > 0 for value in read_log(learnt, "eval_runtime"))


@pytest.mark.slow
def test_the_best_figures_are_those_of_the_saved_model(learnt, read_log, tiny_base, goldens):
    """Computed again from the directory: answers one at a time through inference, the loss row by row."""
    tokenizer, model, processor, _ = load_pretrained_model(
        str(learnt), str(tiny_base), "x", device="cpu", dtype="float32"
    )
    session = Session(tokenizer, model, processor, get_template("vicuna_v1"), 2048)
    accuracy, loss = read_log(learnt, "eval_accuracy"), read_log(learnt, "eval_loss")
    best = accuracy.index(max(accuracy))
    opened = {name: open_image(goldens / "images" / name) for name in ("landscape.jpg", "wide.png")}
    asked = [
        ("What color is it?", [opened["landscape.jpg"]], "yellow"),
        ("Is it a thing?", [opened["wide.png"]], "yes"),
        ("Say it.", [], "No."),
    ]
    prompts = [session.prepare(question, images) for question, images, _ in asked]
    given = [session.answer_prompts([prompt], Sampling())[0] for prompt in prompts]
    ids, labels = encode_example(DIALOGUE["conversations"], "vicuna_v1", tokenizer)
    start = len(labels) - next(place for place, label in enumerate(labels[::-1]) if label == IGNORE_INDEX)
    second = Prompt(ids[:start], session.pixel_values([opened["wide.png"]]))  # the dialogue up to its second answer
    given += session.answer_prompts([second], Sampling(max_new_tokens=64))
    true = [*(answer for *_, answer in asked), "There are two"]
    right = sum(normalize_answer(one) == normalize_answer(other) for one, other in zip(given, true, strict=True))
    assert accuracy[best] == right / 4 > 0
    total, tokens = 0.0, 0
    for record in HELD_OUT:
        ids, labels = encode_example(record["conversations"], "vicuna_v1", tokenizer)
        images = [opened[record["image"]]] if "image" in record else None
        pixels = process_images(images, processor, model.config) if images else None
        with torch.no_grad():
            found = model(torch.tensor([ids]), labels=torch.tensor([labels]), images=pixels).loss.item()
        count = sum(label != IGNORE_INDEX for label in labels)
        total, tokens = total + found * count, tokens + count
    assert loss[best] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_is_the_result(learnt, read_log):
    accuracy = read_log(learnt, "eval_accuracy")
    step = [4, 8, 12, 14][accuracy.index(max(accuracy))]
    kept = {path.name for path in learnt.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step if step < 14 else 12}", "checkpoint-14"}  # of two, the best and the newest
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        result, best = (open_tensor_file(path / name) for path in (learnt, learnt / f"checkpoint-{step}"))
        assert all(torch.equal(result[key], best[key]) for key in best)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_packed_evaluation_gives_the_same_figures(train_tiny, held_out, goldens, tmp_path, monkeypatch, feature):
    """Loss over packs, answers by the engine; also where some questions are left out, and of images and text mixed."""
    shutil.copytree(goldens / "llava-v1.5-golden", tmp_path / "base")
    shutil.copytree(goldens / "clip-vit-tiny-patch14-56", tmp_path / "clip-vit-tiny-patch14-56")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "mm_vision_select_feature": feature}))
    runs, answer, given, count = [], Engine.run, [], Evaluator._count
    monkeypatch.setattr(
        Engine, "run", lambda engine, groups, images: runs.append(len(groups)) or answer(engine, groups, images)
    )
    monkeypatch.setattr(
        Evaluator, "_count", lambda self, answers: given.append(dict(answers)) or count(self, given[-1].items())
    )
    rows = [row("landscape.jpg", answer, f"What is {answer}?") for answer in ("yellow", "yes", "3", "a b c d e f g")]
    flags = [*LORA, *held_out([*rows, DIALOGUE, TEXT, ROWS[2]]), "--max_steps", "2", "--learning_rate", "0"]
    flags += ["--eval_max_new_tokens", "6", "--per_device_eval_batch_size", "3"]
    for name, share in (("shared", "True"), ("apart", "False")):
        words = [*flags, "--share_image_prefix", share]
        assert train_tiny(tmp_path / name, ROWS, *words, base=tmp_path / "base") == 0
    assert runs == [4]  # groups: three images, and text
    assert given[0] == given[1]
    assert sorted(given[0]) == list(range(7))
    assert len(set(given[0].values())) > 2
    shared, apart = ((tmp_path / name / "train_log.jsonl").read_text().splitlines() for name in ("shared", "apart"))
    one, two = (next(line for line in map(json.loads, lines) if "eval_loss" in line) for lines in (shared, apart))
    assert one["eval_questions"] == two["eval_questions"] == 7
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-6)


def test_ranks_together_measure_each_row_once(goldens):
    records = [EncodedRecord([1, number], [1, 1], [Path(f"{number % 3}.jpg")]) for number in range(8)]
    dataset = SupervisedDataset(records, None, ImageSettings("pad"), 1)
    shares = [rows_by_image(dataset, rank, 3) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(8))
    assert [row for share in shares for row in share] == [0, 3, 6, 1, 4, 7, 2, 5]


@pytest.mark.parametrize("size", ["1", "3"])
def test_the_size_of_batches_does_not_matter(train_tiny, read_log, held_out, learnt, tiny_base, tmp_path, size):
    flags = ["--lora_enable", "True", "--lora_weight_path", learnt, "--learning_rate", "0", "--max_steps", "1"]
    assert train_tiny(tmp_path / "out", ROWS, *flags, *held_out(), "--per_device_eval_batch_size", size) == 0
    accuracy = read_log(learnt, "eval_accuracy")
    best = accuracy.index(max(accuracy))
    assert read_log(tmp_path / "out", "eval_accuracy") == [accuracy[best]]
    assert read_log(tmp_path / "out", "eval_loss") == [pytest.approx(read_log(learnt, "eval_loss")[best], rel=1e-5)]


GOLDEN = ["--per_device_train_batch_size", "4", "--learning_rate", "0.03", *LORA]
WORSE = ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--greater_is_better", "True"]
"""The loss falls; taken as the larger the better, each validation is worse than the first."""
EVERY = ["--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
EVERY += ["--eval_max_questions", "0"]


def test_early_stopping_and_where_a_resumed_run_stops(train_tiny, read_log, held_out, goldens, tmp_path):
    flags = [*GOLDEN, *held_out(), *EVERY, *WORSE, "--num_train_epochs", "9", "--early_stopping_patience", "3"]
    base, output = goldens / "llava-v1.5-golden", tmp_path / "out"
    assert train_tiny(output, ROWS, *flags, "--save_total_limit", "9", base=base) == 0
    assert len(read_log(output, "eval_loss")) == 4  # the first, and three that are no better
    assert not read_log(output, "eval_accuracy")
    kept = {path.name for path in output.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (1, 4)
    assert train_tiny(output, ROWS, *flags, "--save_total_limit", "9", base=base) == 0
    assert len(read_log(output, "eval_loss")) == len(read_log(output, "loss")) == 4  # it had ended
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(output / name)
    assert train_tiny(output, ROWS, *flags, base=base) == 0
    assert len(read_log(output, "eval_loss")) == 4  # steps 3 and 4 again in their old lines' place, no further
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1"}  # the limit leaves the best


@pytest.mark.parametrize("kind", [LORA, []], ids=["lora", "full"])
def test_in_half_precision_with_a_trainable_tower(train_tiny, read_log, held_out, goldens, tmp_path, kind):
    """Masters in fp32 beside frozen weights in bf16: answers are computed under autocast, as training is."""
    flags = [*kind, *held_out(), "--bf16", "True", "--unfreeze_mm_vision_tower", "True", "--eval_max_new_tokens", "4"]
    flags += ["--per_device_train_batch_size", "2"]
    assert train_tiny(tmp_path / "out", ROWS, *flags, base=goldens / "llava-v1.5-golden") == 0
    assert read_log(tmp_path / "out", "eval_questions")


def test_a_share_is_held_out(train_tiny, read_log, goldens, tmp_path, capsys):
    rows = [row(image, f"{answer} {index}") for image, answer in COLORS.items() for index in range(3)]
    flags = [*GOLDEN, "--val_share", "0.25", "--eval_strategy", "epoch", "--eval_max_new_tokens", "4"]
    assert train_tiny(tmp_path / "out", rows, *flags, base=goldens / "llava-v1.5-golden") == 0
    printed = capsys.readouterr().out
    assert "rows                  9, 3 images" in printed
    assert "validation            3 rows, 1 images, 3 questions" in printed
    assert len(read_log(tmp_path / "out", "eval_loss")) == 3


def test_rows_about_one_image_cannot_be_split(train_tiny, tmp_path, capsys):
    flags = [*LORA, "--val_share", "0.5", "--eval_strategy", "epoch"]
    assert train_tiny(tmp_path / "out", [ROWS[0], ROWS[0]], *flags) == 1
    assert "error: rows of one image can't be split; pass rows of their own with --eval_data_path" in (
        capsys.readouterr().err
    )


def test_bad_rows_to_validate_on_are_named(train_tiny, held_out, tmp_path, capsys):
    flags = [*LORA, *held_out([row("gone.jpg", "x")])]
    assert train_tiny(tmp_path / "out", ROWS, *flags) == 1
    assert "held_out.json: 1 of 1 rows can't be used\n  row 0: image 'gone.jpg' not found" in capsys.readouterr().err


def test_no_answer_is_short_enough(train_tiny, held_out, tmp_path, capsys):
    flags = [*GOLDEN, *held_out(), *EVERY, "--eval_max_questions", "9", "--eval_max_new_tokens", "1"]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "accuracy"]
    assert train_tiny(tmp_path / "out", ROWS, *flags) == 1
    assert "no validation answer has at most --eval_max_new_tokens 1 tokens, so there is no accuracy" in (
        capsys.readouterr().err
    )
