"""The run manifest, and which differences forbid to resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.records import EncodedRecord
from llava.train.fault_tolerance.run_manifest import (
    add_run_manifest,
    compare_runs,
    digest_records,
    library_versions,
    run_manifest,
)
from llava.train.flags.arguments import as_json
from llava.train.flags.command_line import parse_arguments

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True", "--report_to", "none"]
RECORDS = [EncodedRecord([1, -200, 5], [-100, -100, 5], [Path("a/x.jpg")]), EncodedRecord([1, 7], [-100, 7], [])]


def manifest(*flags, records=RECORDS, **facts):
    arguments = parse_arguments([*NEEDED, *flags])
    found = run_manifest(records, kind="lora", base_fingerprint="f", training_args=arguments[2])
    return json.loads(add_run_manifest(as_json(*arguments), {**found, **facts}))


def test_content():
    found = manifest("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "4", "--lora_r", "8")
    assert found["TrainingArguments"]["lora_r"] == 8
    assert found["run"] == {
        "data_digest": digest_records(RECORDS),
        "rows": 2,
        "rows_per_step": 12,
        "processes": 1,
        "zero_stage": 0,
        "kind": "lora",
        "base_model_fingerprint": "f",
        "image_rules": {"exif_orientation": "applied", "deep_integers": "scaled to 8 bits", "alpha": "dropped"},
    }
    assert found["versions"] == library_versions()
    assert {"python", "torch", "transformers", "peft", "accelerate"} <= set(found["versions"])


def test_absent_libraries_are_left_out(monkeypatch):
    monkeypatch.setattr("llava.train.fault_tolerance.run_manifest.LIBRARIES", ("torch", "no-such-library"))
    assert sorted(library_versions()) == ["python", "torch"]


def test_the_digest_depends_on_ids_labels_images_and_order_but_not_on_folders():
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
def test_differences_that_forbid_to_resume(flags, facts, difference):
    assert "; ".join(compare_runs(manifest(), manifest(*flags, **facts))[0]) == difference


def test_a_base_fingerprint_of_an_earlier_version_resumes():
    now = manifest(base_model_fingerprint="abc-def-012")
    assert compare_runs(manifest(base_model_fingerprint="abc"), now) == ([], [])
    refused = compare_runs(manifest(base_model_fingerprint="abc-def-345"), now)[0]
    assert refused == ["base_model_fingerprint was abc-def-345, now abc-def-012"]


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
def test_differences_that_are_warned_of(flags, facts, differences):
    assert compare_runs(manifest(), manifest(*flags, **facts)) == ([], differences)


def test_another_library(monkeypatch):
    former = manifest()
    former["versions"]["torch"] = "2.10.0"
    now = manifest()
    assert compare_runs(former, now) == ([], [f"torch was 2.10.0, now {now['versions']['torch']}"])


def test_manifests_of_older_versions_are_compared_by_common_entries():
    former = {"TrainingArguments": {"seed": 1}}
    assert compare_runs(former, manifest()) == (["seed was 1, now 42"], [])
    assert compare_runs({}, manifest()) == ([], [])
