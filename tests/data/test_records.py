"""Records are read as they are, and every one that can't be used is named before training starts."""

from __future__ import annotations

import json
import re

import pytest

from llava.data.records import (
    DataError,
    Problem,
    encode_records,
    read_records,
    spliced_length,
)


def record(question="<image>\nWhat?", answer="cat", **keys):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **keys}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "a.jpg").write_bytes(b"")
    (images / "deep" / "b.jpg").write_bytes(b"")
    return images


@pytest.fixture
def encode(tokenizer, folder):
    def run(*records, **changes):
        options = {"image_folder": folder, "patches_per_image": 16, "max_length": 128, **changes}
        return encode_records(records, "v1", tokenizer, **options)

    return run


def test_reads_json_and_jsonl_alike(tmp_path):
    rows = [record(id=1, image="a.jpg", question_id=7), record(question="x\u2028y\x85z")]
    (tmp_path / "data.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (tmp_path / "data.jsonl").write_bytes(lines.encode())
    assert read_records(tmp_path / "data.json") == rows
    assert read_records(tmp_path / "data.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"[{]", r"data.json is no valid JSON: line 1, column 3: Expecting property name"),
        (
            "data.jsonl",
            b'{}\n{"a": 1\n',
            r"data.jsonl: line 2 is no valid JSON \(.*column 8\); mend or remove the line$",
        ),
        ("data.json", b"[]", r"data.json must hold a list of at least one record$"),
        ("data.json", b"{}", r"data.json must hold a list of at least one record$"),
        ("data.jsonl", b"\n", r"data.jsonl must hold a list of at least one record$"),
        ("data.json", b'["\xe9"]', r"data.json is not in UTF-8 \(.*\); save it in UTF-8$"),
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.json not found; make it with task_data_preprocessing.py or"):
        read_records(tmp_path / "data.json")


def test_encodes_rows_with_and_without_images(encode, folder):
    encoded, problems = encode(
        record(image="a.jpg"),
        record(question="What?"),
        record(question="<image> or <image>?", image=["a.jpg", "deep/b.jpg"]),
    )
    assert problems == []
    assert [row.images for row in encoded] == [[folder / "a.jpg"], [], [folder / "a.jpg", folder / "deep/b.jpg"]]
    assert [row.input_ids.count(-200) for row in encoded] == [1, 0, 2]
    assert [[label for label in row.labels if label != -100] for row in encoded] == [[5255, 2]] * 3


def test_every_bad_row_is_found_and_the_good_ones_stay(encode, folder):
    encoded, problems = encode(
        record(image="gone.jpg"),
        record(image="a.jpg"),
        record(image="../secret.jpg"),
        record(image="/etc/passwd"),
        record(),
        record(question="What?", image="a.jpg"),
        record(answer="", image="a.jpg"),
        "text",
        {"id": 3},
        record(image=7),
        record(image=["a.jpg", None]),
        record(question="<image>" + "What? " * 200, image="a.jpg"),
        {"conversations": [3]},
        record(answer="\ud83d", image="a.jpg"),
        record(image="deep"),
    )
    assert [row.images for row in encoded] == [[folder / "a.jpg"]]
    way_out = "write it as in docs/finetune.md"
    no_record = f"not a record: it needs the key 'conversations' with a list of turns; {way_out}"
    name_it = "it is a file name or a list of them; name the file, or leave the key out for text alone"
    outside = f"leads out of the image folder {folder}; name a file inside"
    too_long = "tokens are more than --model_max_length 128; raise it or shorten the row"
    assert [problem._replace(message=re.sub(r"^\d+ tokens", "tokens", problem.message)) for problem in problems] == [
        Problem(0, f"image 'gone.jpg' not found under {folder}; pass --image_folder", "image_missing"),
        Problem(2, f"image '../secret.jpg' {outside}", "path_outside_folder"),
        Problem(3, f"image '/etc/passwd' {outside}", "path_outside_folder"),
        Problem(4, "1 <image> in the text, but 0 image files in the record; write one <image> for each file",
            "image_count"),
        Problem(5, "0 <image> in the text, but 1 image files in the record; write one <image> for each file",
            "image_count"),
        Problem(6, "turn 2, from 'gpt', is empty; write its text, or remove the row", "empty_turn"),
        Problem(7, no_record, "not_a_record"),
        Problem(8, no_record, "not_a_record"),
        Problem(9, f"'image' is 7; {name_it}", "bad_image_field"),
        Problem(10, f"'image' is ['a.jpg', None]; {name_it}", "bad_image_field"),
        Problem(11, too_long, "too_long"),
        Problem(12, "turn 1 is no object with 'from' and 'value'; write it so, or remove the row", "bad_turn"),
        Problem(13, "turn 2, from 'gpt', holds half of a surrogate pair; export the text again as UTF-8, or remove "
            "the row", "half_character"),
        Problem(14, f"image 'deep' not found under {folder}; pass --image_folder", "image_missing"),
    ]  # fmt: skip


def test_a_row_has_as_many_problems_as_it_has(encode, folder):
    bad = {"image": ["gone.jpg", "../x.jpg", "gone.jpg"], "conversations": [{"from": "gpt", "value": "Hi"}]}
    bad["conversations"] += [{"from": "human", "value": None}, {"from": "human", "value": " "}, {"from": "gpt"}]
    _, problems = encode(record(question="What?"), bad, record(question="Why?", image=["a" * 300]))
    assert problems == [
        Problem(1, "turn 2, from 'human', is None, which is no text; put the value in quotes, or remove the row",
            "not_text"),
        Problem(1, "turn 3 is from 'human'; turns alternate, so 'gpt' is due; put the turns in order, or remove the "
            "row", "roles"),
        Problem(1, "turn 3, from 'human', is empty; write its text, or remove the row", "empty_turn"),
        Problem(1, "turn 4, from 'gpt', is empty; write its text, or remove the row", "empty_turn"),
        Problem(1, f"image 'gone.jpg' not found under {folder}; pass --image_folder", "image_missing"),
        Problem(1, f"image '../x.jpg' leads out of the image folder {folder}; name a file inside",
            "path_outside_folder"),
        Problem(2, "0 <image> in the text, but 1 image files in the record; write one <image> for each file",
            "image_count"),
        Problem(2, f"image {'a' * 300!r} not found under {folder}; pass --image_folder", "image_missing"),
    ]  # fmt: skip


def test_an_image_needs_a_folder(encode, tmp_path):
    assert encode(record(image="a.jpg"), image_folder=None)[1] == [
        Problem(0, "image 'a.jpg' needs a folder; pass --image_folder", "no_image_folder")
    ]
    assert encode(record(image="a.jpg"), image_folder=tmp_path / "none")[1] == [
        Problem(0, f"image 'a.jpg' not found under {tmp_path / 'none'}; pass --image_folder", "image_missing")
    ]
    assert encode(record(question="What?"), image_folder=None)[1] == []


def test_length_counts_the_patches(encode):
    ids = [1, -200, 5, -200, 2]
    assert spliced_length(ids, 576) == 3 + 2 * 576
    row = encode(record(image="a.jpg"))[0][0]
    length = spliced_length(row.input_ids, 16)
    assert encode(record(image="a.jpg"), max_length=length)[1] == []
    assert encode(record(image="a.jpg"), max_length=length - 1)[0] == []
