"""What is written of a run, and which differences keep it from going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.records import EncodedRecord
from llava.train.arguments import as_json
from llava.train.command_line import parse_arguments
from llava.train.run_record import add_to_record, compare_runs, digest_records, library_versions, run_facts

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True", "--report_to", "none"]
RECORDS = [EncodedRecord([1, -200, 5], [-100, -100, 5], [Path("a/x.jpg")]), EncodedRecord([1, 7], [-100, 7], [])]


def record(*flags, records=RECORDS, **facts):
    arguments = parse_arguments([*NEEDED, *flags])
    found = run_facts(records, kind="lora", base_fingerprint="f", training_args=arguments[2])
    return json.loads(add_to_record(as_json(*arguments), {**found, **facts}))


def test_what_is_recorded():
    found = record("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "4", "--lora_r", "8")
    assert found["TrainingArguments"]["lora_r"] == 8
    assert found["run"] == {
        "data_digest": digest_records(RECORDS),
        "rows": 2,
        "rows_per_step": 12,
        "processes": 1,
        "zero_stage": 0,
        "kind": "lora",
        "base_model_fingerprint": "f",
    }
    assert found["versions"] == library_versions()
    assert {"python", "torch", "transformers", "peft", "accelerate"} <= set(found["versions"])


def test_absent_libraries_are_left_out(monkeypatch):
    monkeypatch.setattr("llava.train.run_record.LIBRARIES", ("torch", "no-such-library"))
    assert sorted(library_versions()) == ["python", "torch"]


def test_the_digest_sees_ids_labels_images_and_order_but_no_folder():
    one, two = RECORDS
    whole = digest_records(RECORDS)
    assert digest_records([one._replace(images=[Path("elsewhere/x.jpg")]), two]) == whole
    others = [
        [two, one],
        [one],
        [one._replace(images=[Path("a/y.jpg")]), two],
        [one._replace(input_ids=[1, -200, 6]), two],
        [one._replace(labels=[-100, 0, 5]), two],
        [EncodedRecord([1, -200], [-100, -100], one.images), EncodedRecord([5, 1, 7], [5, -100, 7], [])],
    ]
    assert len({whole, *map(digest_records, others)}) == 1 + len(others)


REFUSED = [
    (["--seed", "1"], {}, "seed was 42, now 1"),
    (["--lora_r", "8"], {}, "lora_r was 64, now 8"),
    (["--mm_projector_lr", "1e-5"], {}, "mm_projector_lr was None, now 1e-05"),
    (["--lora_bias", "all"], {}, "lora_bias was none, now all"),
    (["--group_by_modality_length", "True"], {}, "group_by_modality_length was False, now True"),
    (["--image_aspect_ratio", "square"], {}, "image_aspect_ratio was None, now square"),
    ([], {"data_digest": "x"}, f"data_digest was {digest_records(RECORDS)}, now x"),
    (["--per_device_train_batch_size", "4"], {}, "rows_per_step was 8, now 4"),
    ([], {"zero_stage": 2, "processes": 2}, "zero_stage was 0, now 2; processes was 1, now 2"),
]


@pytest.mark.parametrize(("flags", "facts", "difference"), REFUSED)
def test_what_can_not_go_on(flags, facts, difference):
    assert "; ".join(compare_runs(record(), record(*flags, **facts))[0]) == difference


WARNED = [
    (["--learning_rate", "1e-3"], {}, ["learning_rate 5e-05 stays, 0.001 has no effect"]),
    (["--num_train_epochs", "5"], {}, ["num_train_epochs was 3.0, now 5.0"]),
    (["--lora_dropout", "0.5"], {}, ["lora_dropout was 0.05, now 0.5"]),
    ([], {"processes": 2}, ["processes was 1, now 2"]),
    (
        ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
        {},
        ["per_device_train_batch_size was 8, now 4", "gradient_accumulation_steps was 1, now 2"],
    ),
    (["--output_dir", "moved", "--save_steps", "7", "--logging_steps", "3", "--dataloader_num_workers", "2"], {}, []),
]


@pytest.mark.parametrize(("flags", "facts", "differences"), WARNED)
def test_what_goes_on_with_a_word(flags, facts, differences):
    assert compare_runs(record(), record(*flags, **facts)) == ([], differences)


def test_another_library(monkeypatch):
    former = record()
    former["versions"]["torch"] = "2.10.0"
    now = record()
    assert compare_runs(former, now) == ([], [f"torch was 2.10.0, now {now['versions']['torch']}"])


def test_records_of_older_versions_are_compared_by_what_they_hold():
    former = {"TrainingArguments": {"seed": 1}}
    assert compare_runs(former, record()) == (["seed was 1, now 42"], [])
    assert compare_runs({}, record()) == ([], [])
