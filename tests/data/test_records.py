"""Records are read as they are, and every one that can't be used is named before training starts."""

from __future__ import annotations

import json
import re

import pytest

from llava.data.records import (
    DataError,
    encode_records,
    read_records,
    spliced_length,
)
from llava.data.row_errors import RowError

CORRECT_IT = "correct the name or pass --image_folder"


def at(row, message, code):
    return RowError(code, message, row=row)


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
        ("data.json", b"[{]", r"data.json is not valid JSON: line 1, column 3: Expecting property name"),
        (
            "data.jsonl",
            b'{}\n{"a": 1\n',
            r"data.jsonl: line 2 is not valid JSON \(.*column 8\); fix or remove the line$",
        ),
        ("data.json", b"[]", r"data.json must hold a list of at least one record$"),
        ("data.json", b"{}", r"data.json holds an empty object, not a list of rows; write the rows as a list, or one"),
        ("data.json", b"7", r"data.json must hold a list of objects, or one object per line$"),
        ("data.json", b'{"data": []}', r"object with the key 'data', not a list of rows; write the list under 'data' "),
        ("data.json", b'{"a": {}, "b": {}}', r"object with the keys 'a', 'b', not a list of rows; write its values as"),
        ("data.json", b'[\n{"a": 1},\n]', r"line \d, column \d+: a comma before the closing ']', which JSON does not"),
        (
            "data.json",
            b'[{"a": 1,}]',
            r"line 1, column \d+: a comma before the closing '}', which JSON does not",
        ),
        (
            "data.json",
            b"[{'a': 1}]",
            r"line 1, column 3: single quotes, as Python prints them; JSON wants double",
        ),
        ("data.json", b'[{"a": None}]', r"line 1, column 8: True, False or None, as Python prints them; JSON has true"),
        (
            "data.json",
            b'[{"a": 1}',
            r"is not valid JSON: line 1, column 10: Expecting ',' delimiter; fix it$",
        ),
        ("data.json", b"[" * 100_000, r"data.json is not valid JSON: nested too deep; export it again$"),
        ("data.jsonl", b"{'a': 1}\n", r"line 1 is not valid JSON \(single quotes, as Python prints them; JSON wants"),
        ("data.jsonl", b"[" * 100_000, r"data.jsonl is not valid JSON: nested too deep; export it again$"),
        (
            "data.tsv",
            b"a\tb",
            r"data.tsv is a table, not JSON; make records of it: python task_data_preprocessing.py --input "
            r"\S*data.tsv --output data.json$",
        ),
        ("data.json", b"BZh91AY", r"data.json is not JSON, but a bzip2 archive; unpack it$"),
        (
            "data.json",
            b"\n<!DOCTYPE html>",
            r"is not JSON, but a web page \(HTML\); the download went wrong, fetch the",
        ),
        ("data.xlsx", b"PK", r"data.xlsx is a table, not JSON; make records of it: python task_data_preprocessing"),
        (
            "data.json",
            b"PK\x03\x04\x00",
            r"data.json is not JSON, but a zip archive or an .xlsx table; unpack",
        ),
        (
            "data.json",
            b"version https://git-lfs.github.com/spec/v1",
            r"not JSON, but a Git LFS pointer; fetch",
        ),
        ("data.jsonl", b"\n", r"data.jsonl must hold a list of at least one record$"),
        (
            "data.json",
            b'[\n"\xe9"]',
            r"data.json is not in UTF-8 \(byte 0xe9 at offset 3, line 2\); save it in",
        ),
    ],
)
def test_what_is_not_a_data_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_a_folder_is_refused_and_its_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name a file; it holds no .json or .jsonl file$"):
        read_records(tmp_path)
    for name in ("b.jsonl", "a.json", "c.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"is a folder; name a file, such as a.json, b.jsonl in it$"):
        read_records(tmp_path)


ROWS = [record(id=1, image="a.jpg"), record(question="Wörter 漢字 🙂")]
LINES = "\n".join(json.dumps(row) for row in ROWS)
SHAPES = {
    "a list in lines": ("data.jsonl", json.dumps(ROWS), "holds one JSON list, not an object per line"),
    "a list over lines": ("data.jsonl", json.dumps(ROWS, indent=1), "holds one JSON list, not an object per line"),
    "objects over lines": ("data.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "holds 2 objects one after another over several lines"),
    "lines in a list": ("data.json", LINES, "holds 2 objects one after another, not a JSON list"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "note"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_shapes_and_encodings_are_read_and_reported_once(tmp_path, caplog, name, text, note, encoding):
    (tmp_path / name).write_text(text.replace("\n", "\r\n"), encoding=encoding, newline="")
    assert read_records(tmp_path / name) == ROWS
    [reported] = [entry.getMessage() for entry in caplog.records if note in entry.getMessage()]
    assert reported.startswith(f"{tmp_path / name} {note}")
    assert reported.endswith("and is read as that")
    others = [entry.getMessage() for entry in caplog.records if entry.getMessage() != reported]
    expected = [] if encoding.startswith("utf-8") else [f"{tmp_path / name} is in {encoding[:6].upper()}, not UTF-8, "]
    assert [other.partition("and is")[0] for other in others] == expected


def test_a_single_record_is_read_as_a_list(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS[0], indent=2))
    assert read_records(tmp_path / "data.json") == ROWS[:1]


OURS = record(image="a.jpg")
PARTS = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]
TEXTS = ("<image>\nWhat?", "cat")


def renamed(role, text, roles):
    return [{role: name, text: value} for name, value in zip(roles, TEXTS, strict=True)]


FOREIGN = [
    {"messages": OURS["conversations"], "images": "a.jpg"},
    {"image": "a.jpg", "conversations": renamed("from", "value", ("user", "Assistant"))},
    {"image": "a.jpg", "messages": renamed("role", "content", ("user", "assistant"))},
    {"image": "a.jpg", "conversations": renamed("role", "value", ("human", "gpt"))},
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_names_of_other_formats_are_read(tmp_path, caplog, foreign):
    (tmp_path / "data.json").write_text(json.dumps([OURS, foreign, foreign]))
    assert read_records(tmp_path / "data.json") == [OURS] * 3
    [note] = [entry.getMessage() for entry in caplog.records]
    assert note.startswith(f"{tmp_path / 'data.json'}: read '")


def test_lists_of_parts_and_of_images_are_read(tmp_path):
    turns = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}]
    rows = [{"messages": turns}, {"messages": [{**turns[0], "content": PARTS[::-1]}, turns[1]], "images": ["b.jpg"]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    first, second = read_records(tmp_path / "data.json")
    assert first == record(image=["a.jpg"])
    assert second == record(question="What?\n<image>", image=["b.jpg"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "input_image", "image_url": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
    ],
)
def test_image_parts_of_other_interfaces_are_read(tmp_path, part):
    asked = [part, {"type": "input_text", "text": "What?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "cat"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))
    assert read_records(tmp_path / "data.json") == [record(image=["a.jpg"])]


def test_what_would_be_left_out_in_silence_is_refused(encode):
    _, errors = encode(
        record(question="What?", system="Be brief."),
        record(question="What?", video="a.mp4"),
        record(question="<video> What?", image="a.jpg"),
    )
    assert [(error.row, error.code) for error in errors] == [
        (0, "system_turn"), (1, "bad_image_field"), (2, "image_count"),
    ]  # fmt: skip
    assert "the record has 'system', and the template has a system prompt of its own" in errors[0].message


def test_what_other_formats_mean_is_not_guessed(encode):
    own = record()["conversations"]
    system = {"from": "system", "value": "Be brief."}
    _, errors = encode(
        {"conversations": [system, *own], "image": "a.jpg"},
        {"conversations": [{"from": "function", "value": "x"}, *own]},
        {"conversations": [{"speaker": "me", "text": "x"}]},
        {"instruction": "What?", "output": "cat", "image": "a.jpg"},
        record(question="What?", image_path="a.jpg"),
        record(question="<Image>\nWhat?", image="a.jpg"),
        record(question="What?", answer="<image> cat", image="a.jpg"),
    )
    assert [(error.row, error.code) for error in errors] == [
        (0, "system_turn"), (1, "roles"), (2, "bad_turn"), (3, "not_a_record"), (4, "bad_image_field"),
        (5, "image_count"), (6, "image_in_answer"),
    ]  # fmt: skip
    for error, words in zip(
        errors,
        (
            "write its text in front of the first question",
            "turn 1 is from 'function'; roles are 'human' and 'gpt'",
            "turn 1 is not an object with 'from' and 'value', but has 'speaker', 'text'",
            "needs the key 'conversations' with a list of turns, and has 'instruction', 'output', 'image'",
            "the record has 'image_path' and no 'image'; name the file under 'image'",
            "0 <image> in the text, but 1 image files in the record; <Image> is read as text; write one <image>",
            "turn 2, from 'gpt', holds <image>: an answer has no image; move it into a question",
        ),
        strict=True,
    ):
        assert words in error.message


def test_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.json not found; make it with task_data_preprocessing.py or"):
        read_records(tmp_path / "data.json")


def test_encodes_rows_with_and_without_images(encode, folder):
    encoded, errors = encode(
        record(image="a.jpg"),
        record(question="What?"),
        record(question="<image> or <image>?", image=["a.jpg", "deep/b.jpg"]),
    )
    assert errors == []
    assert [row.images for row in encoded] == [[folder / "a.jpg"], [], [folder / "a.jpg", folder / "deep/b.jpg"]]
    assert [row.input_ids.count(-200) for row in encoded] == [1, 0, 2]
    assert [[label for label in row.labels if label != -100] for row in encoded] == [[5255, 2]] * 3


def test_every_bad_row_is_found_and_the_good_ones_stay(encode, folder):
    encoded, errors = encode(
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
    outside = f"leads out of the image folder {folder}; name a file inside, or give the folder that holds all images"
    outside += " (/ allows every absolute name)"
    there = f"not found under {folder}, its folder has 1 image, such as 'a.jpg'"
    name_it = "it is a file name or a list of them; name the file under 'image', or leave the key out for text alone"
    too_long = "tokens are more than --model_max_length 128; raise it or shorten the row"
    assert [error._replace(message=re.sub(r"^\d+ tokens", "tokens", error.message)) for error in errors] == [
        at(0, f"image 'gone.jpg' {there}; {CORRECT_IT}", "image_missing"),
        at(2, f"image '../secret.jpg' {outside}", "path_outside_folder"),
        at(3, f"image '/etc/passwd' {outside}", "path_outside_folder"),
        at(4, "1 <image> in the text, but 0 image files in the record; write one <image> for each file",
            "image_count"),
        at(5, "0 <image> in the text, but 1 image files in the record; write one <image> for each file",
            "image_count"),
        at(6, "turn 2, from 'gpt', is empty; write its text, or remove the row", "empty_turn"),
        at(7, no_record, "not_a_record"),
        at(8, no_record.replace("turns;", "turns, and has 'id';"), "not_a_record"),
        at(9, f"'image' is 7; {name_it}", "bad_image_field"),
        at(10, f"'image' is ['a.jpg', None]; {name_it}", "bad_image_field"),
        at(11, too_long, "too_long"),
        at(12, "turn 1 is not an object with 'from' and 'value'; write it so, or remove the row", "bad_turn"),
        at(13, "turn 2, from 'gpt', holds half of a surrogate pair; export the text again as UTF-8, or remove "
            "the row", "half_character"),
        at(14, f"image 'deep' not found under {folder}, it is a folder; {CORRECT_IT}", "image_missing"),
    ]  # fmt: skip


def test_all_errors_of_a_row_are_reported(encode, folder):
    bad = {"image": ["gone.jpg", "../x.jpg", "gone.jpg"], "conversations": [{"from": "gpt", "value": "Hi"}]}
    bad["conversations"] += [{"from": "human", "value": None}, {"from": "human", "value": " "}, {"from": "gpt"}]
    there = f"not found under {folder}, its folder has 1 image, such as 'a.jpg'"
    _, errors = encode(record(question="What?"), bad, record(question="Why?", image=["a" * 300]))
    assert errors == [
        at(1, "turn 2, from 'human', is None, which is not text; put the value in quotes, or remove the row",
            "not_text"),
        at(1, "turn 3 is from 'human'; turns alternate, so 'gpt' is due; put the turns in order, or remove the "
            "row", "roles"),
        at(1, "turn 3, from 'human', is empty; write its text, or remove the row", "empty_turn"),
        at(1, "turn 4, from 'gpt', is empty; write its text, or remove the row", "empty_turn"),
        at(1, f"image 'gone.jpg' {there}; {CORRECT_IT}", "image_missing"),
        at(1, f"image '../x.jpg' leads out of the image folder {folder}; name a file inside, or give the folder "
            "that holds all images (/ allows every absolute name)", "path_outside_folder"),
        at(2, "0 <image> in the text, but 1 image files in the record; write one <image> for each file",
            "image_count"),
        at(2, f"image {'a' * 300!r} {there}; {CORRECT_IT}", "image_missing"),
    ]  # fmt: skip


def test_an_image_needs_a_folder(encode, tmp_path):
    assert encode(record(image="a.jpg"), image_folder=None)[1] == [
        at(0, "image 'a.jpg' needs a folder; pass --image_folder", "no_image_folder")
    ]
    assert encode(record(image="x.jpg"), image_folder=tmp_path / "none")[1] == [
        at(
            0,
            f"image 'x.jpg' not found under {tmp_path / 'none'}, there is no folder {tmp_path / 'none'}; {CORRECT_IT}",
            "image_missing",
        )
    ]
    assert encode(record(question="What?"), image_folder=None)[1] == []


def test_length_counts_the_patches(encode):
    ids = [1, -200, 5, -200, 2]
    assert spliced_length(ids, 576) == 3 + 2 * 576
    row = encode(record(image="a.jpg"))[0][0]
    length = spliced_length(row.input_ids, 16)
    assert encode(record(image="a.jpg"), max_length=length)[1] == []
    assert encode(record(image="a.jpg"), max_length=length - 1)[0] == []
