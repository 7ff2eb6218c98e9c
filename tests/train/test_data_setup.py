"""Data are checked before the weights are loaded: unusable rows stop the run or are left out, the result is cached."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.doctor.images import check_images
from llava.data.records import DataError, EncodedRecord
from llava.train import data_setup as data_check
from llava.train import recipe, train
from llava.train.data_setup import load_data, warn_of_long_rows
from llava.train.flags.arguments import DataArguments
from llava.train.flags.training_arguments import TrainingArguments

IMAGES = ("square.png", "tiny.png", "gray.jpg")


def row(number, image=None, answer="yes"):
    question = ("<image>\n" if image else "") + f"What is {number}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns, **({"image": image} if image else {})}


GOOD = [row(number, name) for number, name in enumerate(IMAGES)]
BAD = [GOOD[0], row(1, "half.jpg"), GOOD[1], row(3, answer=""), row(4, "half.jpg"), GOOD[2]]


@pytest.fixture
def load(tmp_path, goldens, tokenizer, monkeypatch):
    """Return the function (rows by file name, **options) -> encoded rows, of the process that RANK names."""
    for name in IMAGES:
        (tmp_path / name).write_bytes((goldens / "images" / name).read_bytes())
    content = (goldens / "images" / "landscape.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    output = tmp_path / "out"
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True, report_to="none", model_max_length=256)
    config = SimpleNamespace(conversation_template="vicuna_v1", mm_use_im_start_end=False)
    checkpoint = SimpleNamespace(config=config, tokenizer=tokenizer)

    def run(files=None, rank="0", **options):
        for name, rows in (files or {}).items():
            text = "\n".join(map(json.dumps, rows)) if name.endswith(".jsonl") else json.dumps(rows)
            (tmp_path / name).write_text(text)
        monkeypatch.setenv("RANK", rank)
        data_path = options.pop("data_path", ",".join(str(tmp_path / name) for name in files or ["d.json"]))
        data = DataArguments(data_path=data_path, image_folder=str(tmp_path), **options)
        with monkeypatch.context() as patch:
            patch.setattr(data_check, "check_images", counting)
            return load_data(data, arguments, checkpoint, 16)

    def counting(paths, **options):
        run.decoded += 1
        return check_images(paths, **options)

    run.decoded = 0
    return run


def test_good_data_are_encoded_in_order(load, tmp_path, caplog):
    with caplog.at_level("INFO"):
        kept = load({"d.json": GOOD})
    assert [record.images for record in kept] == [[tmp_path / name] for name in IMAGES]
    assert "0 of 3 rows can't be trained on" in caplog.text
    assert load.decoded == 1


def test_broken_images_stop_the_run(load, tmp_path):
    with pytest.raises(DataError) as stop:
        load({"d.json": BAD})
    lines = str(stop.value).splitlines()
    assert lines[0] == f"{tmp_path / 'd.json'}: 3 of 6 rows can't be used"
    assert lines[1].startswith(f"  row 1: image {tmp_path / 'half.jpg'} can't be decoded (")
    assert lines[2] == "  row 3: turn 2, from 'gpt', is empty; write its text, or remove the row"
    assert lines[3].startswith("  row 4: image ")
    assert lines[4:] == ["fix these rows, or pass --on_bad_row skip"]
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_left_out_listed_and_never_replaced(load, tmp_path, caplog):
    kept = load({"d.json": BAD}, on_bad_row="skip")
    assert [record.images for record in kept] == [[tmp_path / name] for name in IMAGES]
    path = tmp_path / "out" / "skipped_rows.jsonl"
    assert "d.json: 3 of 6 rows can't be used\n  row 1: image " in caplog.text
    assert f"they are left out; {path} lists them all" in caplog.text
    skipped = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["code"], entry["file"], entry["row"]) for entry in skipped] == [
        ("image_corrupt", str(tmp_path / "d.json"), 1),
        ("empty_turn", str(tmp_path / "d.json"), 3),
        ("image_corrupt", str(tmp_path / "d.json"), 4),
    ]


def test_all_skipped_rows_are_in_the_file_and_twenty_in_the_log(load, tmp_path, caplog):
    load({"d.json": [*GOOD, *[row(number, "half.jpg") for number in range(30)]]}, on_bad_row="skip")
    assert "  ... and 10 more\nthey are left out" in caplog.text
    assert len((tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()) == 30


def test_rows_of_several_files_are_skipped_by_file(load, tmp_path):
    files = {"one.json": BAD, "two.jsonl": [row(9, answer=" "), row(10, "tiny.png")]}
    kept = load(files, on_bad_row="skip")
    assert [record.images for record in kept] == [[tmp_path / name] for name in (*IMAGES, "tiny.png")]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in skipped] == [
        *((str(tmp_path / "one.json"), number) for number in (1, 3, 4)),
        (str(tmp_path / "two.jsonl"), 0),
    ]


def test_an_unreadable_line_is_skipped_too(load, tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join([json.dumps(GOOD[0]), "{", json.dumps(GOOD[1])]))
    kept = load(data_path=str(tmp_path / "lines.jsonl"), on_bad_row="skip")
    assert [record.images[0].name for record in kept] == ["square.png", "tiny.png"]
    with pytest.raises(DataError, match=r"row 1: line 2 is not valid JSON \(.*\); fix or remove the line\nfix these"):
        load(data_path=str(tmp_path / "lines.jsonl"))


def test_no_row_left(load):
    with pytest.raises(DataError, match=r"1 of 1 rows can't be used\n.*\nno row is left to train on; fix them$"):
        load({"d.json": BAD[1:2]}, on_bad_row="skip")


def test_what_was_checked_is_not_checked_again(load, tmp_path, caplog):
    load({"d.json": BAD}, on_bad_row="skip")
    with caplog.at_level("INFO"):
        again = load(on_bad_row="skip")
    assert load.decoded == 1
    assert [record.images[0].name for record in again] == list(IMAGES)
    place = tmp_path / "d.json.checked"
    assert f"the data were checked before and have not changed since ({place})\n3 of 6 rows" in caplog.text


@pytest.mark.parametrize("name", ["d.json", "square.png"])
def test_a_changed_file_is_checked_again(load, tmp_path, name):
    load({"d.json": GOOD})
    os.utime(tmp_path / name, ns=(1, 1))
    load()
    assert load.decoded == 2


def test_a_fixed_image_is_used(load, tmp_path, goldens):
    with pytest.raises(DataError):
        load({"d.json": BAD[:2]})
    (tmp_path / "half.jpg").write_bytes((goldens / "images" / "landscape.jpg").read_bytes())
    assert len(load()) == 2


def test_skip_data_check_still_finds_unusable_records(load, tmp_path):
    kept = load({"d.json": BAD}, on_bad_row="skip", skip_data_check=True)
    assert load.decoded == 0
    assert [record.images[0].name for record in kept if record.images[0].name == "half.jpg"] == ["half.jpg"] * 2
    with pytest.raises(DataError, match=r"1 of 6 rows can't be used\n  row 3: turn 2, from 'gpt', is empty"):
        load(skip_data_check=True)
    assert not (tmp_path / "d.json.checked").exists()


def test_other_processes_use_the_first_ones_result_and_log_nothing(load, tmp_path, caplog):
    first = load({"d.json": BAD}, on_bad_row="skip")
    caplog.clear()
    (tmp_path / "out" / "skipped_rows.jsonl").unlink()
    assert load(rank="1", on_bad_row="skip") == first
    assert load.decoded == 1
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == []
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()


def test_every_process_stops_for_the_first_ones_row_errors(load):
    for rank in ("0", "1"):
        with pytest.raises(DataError, match="3 of 6 rows can't be used"):
            load({"d.json": BAD} if rank == "0" else None, rank=rank)
    assert load.decoded == 1


def test_a_broken_image_stops_training_before_the_weights_are_loaded(goldens, load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "load_model", lambda *arguments: pytest.fail("the weights were loaded"))
    with pytest.raises(DataError):
        load({"d.json": BAD})
    words = ["--model_name_or_path", str(goldens / "llava-v1.5-golden"), "--image_folder", str(tmp_path)]
    words += ["--data_path", str(tmp_path / "d.json"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    assert train.main([*words, "--report_to", "none", "--disable_tqdm", "True"]) == 1
    assert "3 of 6 rows can't be used\n  row 1: image" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert train.main([*words, "--report_to", "none", "--disable_tqdm", "True"]) == 1
    assert capsys.readouterr().err == ""


def test_rows_longer_than_the_models_positions_are_logged_once(caplog):
    records = [EncodedRecord([1] * n + [IMAGE_TOKEN_INDEX], [1] * (n + 1), []) for n in (8, 9, 20)]
    warn_of_long_rows(records, patches=4, positions=12)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("2 of 3 rows are longer than the model's 12 positions (max_position_embedd")
    assert "the longest has 24 tokens" in caplog.messages[0]
    assert "--model_max_length 12" in caplog.messages[0]
    caplog.clear()
    warn_of_long_rows(records, patches=4, positions=24)
    assert not caplog.messages
