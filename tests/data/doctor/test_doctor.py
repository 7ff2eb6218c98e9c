"""The doctor as a program: faults injected at random are reported with their row and code, and nothing else."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data.doctor.__main__ import main
from llava.data.row_errors import UNUSABLE, WARNINGS

IMAGES = ("a.png", "b.png", "deep/c.png")


def turns(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, goldens):
    images = tmp_path_factory.mktemp("doctor") / "images"
    (images / "deep").mkdir(parents=True)
    for name in IMAGES:
        Image.new("RGB", (8, 6)).save(images / name)
    image = (goldens / "images" / "landscape.jpg").read_bytes()
    (images / "half.jpg").write_bytes(image[: len(image) // 2])
    (images / "empty.jpg").write_bytes(b"")
    Image.new("1", (30_000, 1)).save(images / "thin.png")
    Image.new("F", (4, 4)).save(images / "float.tif")
    return images


@pytest.fixture(scope="module")
def examine(folder, goldens, tmp_path_factory):
    """Return the function (texts by file name, *flags) -> exit code and JSON report of the program."""
    directory = tmp_path_factory.mktemp("data")

    def run(files, *flags, images=folder, model=goldens / "llava-v1.5-golden"):
        shutil.rmtree(directory)
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
        words = ["--data_path", *(directory / name for name in files), "--json", directory / "report.json"]
        words += ["--image_folder", images] if images else []
        words += ["--model_name_or_path", model, "--model_max_length", "300"] if model else []
        code = main([str(word) for word in [*words, *flags]])
        report = json.loads((directory / "report.json").read_text()) if (directory / "report.json").exists() else None
        return code, report

    return run


def as_text(name, rows):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "\n".join(texts) + "\n" if name.endswith(".jsonl") else "[" + ",\n".join(texts) + "]"


def good_row(number, kind):
    """A row with nothing wrong, of one of several kinds; no two ask the same."""
    name = IMAGES[number % len(IMAGES)]
    rows = (
        {"image": name, "conversations": turns(f"<image>\nWhat is {number}?", ("none", "n/a", "yes")[number % 3])},
        {"conversations": turns(f"What is {number}?", "Nothing.")},
        {"image": [name, "a.png"], "conversations": turns(f"<image> or <image>, {number}?", "this", "Why?", "so")},
        {"image": name, "conversations": turns(f"What is {number}?\n<image>", "nan bread", "Is it?", "no")},
    )
    return {"id": number, **rows[kind % len(rows)]}


def with_image(name):
    return lambda row: {"image": name, "conversations": turns(f"<image>\nWhat about {row['id']}?", "yes")}


def with_last(text):
    """The last answer replaced."""
    return lambda row: {**row, "conversations": [*row["conversations"][:-1], {"from": "gpt", "value": text}]}


FAULTS = {
    "unreadable_line": lambda row: json.dumps(row)[:-2],
    "not_a_record": lambda row: {"id": row["id"], "dialogue": row["conversations"]},
    "bad_image_field": lambda row: {**row, "image": {"name": "a.png"}},
    "bad_turn": lambda row: {**row, "conversations": [*row["conversations"], "bye"]},
    "roles": lambda row: {**row, "conversations": [*row["conversations"], {"from": "gpt", "value": "and more"}]},
    "system_turn": lambda row: {**row, "conversations": [{"from": "system", "value": "So."}, *row["conversations"]]},
    "image_in_answer": lambda row: {"image": "a.png", "conversations": turns(f"What is {row['id']}?", "<image> so")},
    "special_token": with_last("ball</s>"),
    "prompt_in_text": with_last("USER: What? ASSISTANT: a ball"),
    "unknown_image_mark": with_last("<Image> ball"),
    "not_text": with_last(float("nan")),
    "empty_turn": with_last(" \n"),
    "half_character": with_last("\ud83d"),
    "unsupervised": lambda row: {"conversations": turns(f"What about {row['id']}?")},
    "image_count": lambda row: {**row, "image": ["a.png"] * 7},
    "path_outside_folder": with_image("../a.png"),
    "image_missing": with_image("gone.png"),
    "image_corrupt": with_image("half.jpg"),
    "image_depth": with_image("float.tif"),
    "image_too_large": with_image("thin.png"),
    "too_long": lambda row: {**row, "conversations": [*row["conversations"], *turns("Why? " * 300, "so")]},
    "missing_value": with_last("nan"),
    "duplicate": lambda row: {**good_row(0, 0), "id": row["id"]},
    "conflicting_answers": lambda row: {
        **good_row(1, 0),
        "conversations": turns("<image>\nWhat is 1?", f"{row['id']}"),
    },
    "opening_left_out": lambda row: {**row, "conversations": [{"from": "gpt", "value": "Hi"}, *row["conversations"]]},
    "question_without_text": lambda row: (
        {**row, "conversations": [*row["conversations"], *turns("<image>", "x")]}
        | {"image": [*([row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])), "b.png"]}
    ),
}
ELSEWHERE = {"no_image_folder", "caption_without_image"}


def test_every_code_is_put_in_somewhere():
    assert set(FAULTS) | ELSEWHERE == set(UNUSABLE) | set(WARNINGS)
    assert not set(UNUSABLE) & set(WARNINGS)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_faults_at_random_rows_are_found_with_row_and_code_and_nothing_else(examine, capsys, data):
    kinds = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=40))
    rows = [good_row(number, 0 if number < 2 else kind) for number, kind in enumerate(kinds)]
    cut = data.draw(st.integers(2, len(rows) - 1))  # what stands before it goes into a JSON list, the rest into lines
    bad_rows = data.draw(st.lists(st.integers(2, len(rows) - 1), unique=True, max_size=15))
    expected = []
    for index in sorted(bad_rows):
        code = data.draw(st.sampled_from(sorted(code for code in FAULTS if index >= cut or code != "unreadable_line")))
        rows[index] = FAULTS[code](rows[index])
        expected.append((code, *(("one.json", index) if index < cut else ("two.jsonl", index - cut))))
    files = {"one.json": as_text("one.json", rows[:cut]), "two.jsonl": as_text("two.jsonl", rows[cut:])}
    code, report = examine(files)
    found = [(entry["code"], entry["file"].rpartition("/")[2], entry["row"]) for entry in report["findings"]]
    assert found == expected
    assert code == bool(expected)
    unusable = sum(code in UNUSABLE for code, *_ in expected)
    assert report["statistics"]["usable_rows"] == len(rows) - unusable
    assert f"{unusable:,} of {len(rows):,} rows can't be trained on" in capsys.readouterr().out


@given(codes=st.sets(st.sampled_from(["not_text", "empty_turn", "roles", "half_character", "image_missing"])))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_faults_of_one_row_are_all_reported(examine, codes):
    texts = {"not_text": 5, "empty_turn": "", "half_character": "\udc00"}
    row = {"image": "gone.png" if "image_missing" in codes else "a.png", "conversations": turns("<image> What?", "x")}
    for code in sorted(codes & set(texts)):
        row["conversations"] += turns("And?", texts[code])
    if "roles" in codes:
        row["conversations"] += turns("bye", "bye")[1:]
    _, report = examine({"d.json": as_text("d.json", [row])})
    assert sorted(entry["code"] for entry in report["findings"]) == sorted(codes)


GOOD = good_row(0, 0)
MESSAGES = [
    ("d.jsonl", ["{]"], "unreadable_line",
        "line 2 is not valid JSON (Expecting property name enclosed in double quotes, column 2); fix or remove the "
        "line"),
    ("d.json", [[]], "not_a_record",
        "not a record: it needs the key 'conversations' with a list of turns; write it as in docs/finetune.md"),
    ("d.json", [{"conversations": []}], "unsupervised",
        "the dialogue has no answer, so there is nothing to learn from it; add the answer, or remove the row"),
    ("d.json", [{"conversations": turns("What?", None)}], "not_text",
        "turn 2, from 'gpt', is None, which is not text; put the value in quotes, or remove the row"),
    ("d.json", [{"conversations": turns("What?", "null")}], "missing_value",
        "turn 2, from 'gpt', is 'null', like a missing value; check how the table was exported; if it is meant, "
        "nothing needs to be done"),
    ("d.json", [{"image": "a.png", "conversations": turns("<image>\n", "a")}], "question_without_text",
        "turn 1, from 'human', has an image and no text; write a question beside the image"),
    ("d.json", [{"conversations": [{"from": "gpt", "value": "Hi"}, *turns("What?", "a")]}], "opening_left_out",
        "turn 1, from 'gpt', stands before the first question and is left out; begin with a question if it is to be "
        "learnt"),
    ("d.json", [GOOD], "duplicate",
        "question, image and answer are those of row 0; remove one of them, or both count twice"),
    ("d.json", [{**GOOD, "conversations": turns("<image>\nWhat is 0?", "no")}], "conflicting_answers",
        "question and image are those of row 0, answered 'none' there and 'no' here; keep the right one, unless both "
        "are meant"),
    ("d.json", [{"image": "thin.png", "conversations": turns("<image>\nWhat?", "a")}], "image_too_large",
        "image {folder}/thin.png: 30000x1 pixels; make it smaller"),
    ("d.json", [{"image": "empty.jpg", "conversations": turns("<image>\nWhat?", "a")}], "image_corrupt",
        "image {folder}/empty.jpg can't be decoded (it holds nothing, the file is empty); fetch or export it again"),
    ("d.json", [{"image": "float.tif", "conversations": turns("<image>\nWhat?", "a")}], "image_depth",
        "image {folder}/float.tif holds 32-bit floating-point numbers, and no file says which is black and which is "
        "white; save it with 8 bits, or with 16 bits from 0 to 65535"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "code", "message"), MESSAGES, ids=[case[2] for case in MESSAGES])
def test_messages(examine, folder, name, bad, code, message):
    status, report = examine({name: as_text(name, [GOOD, *bad])})
    assert status == 1
    [error] = report["findings"]
    assert (error["code"], error["row"]) == (code, 1)
    assert error["severity"] == ("unusable" if code in UNUSABLE else "warning")
    assert error["message"] == message.replace("{folder}", str(folder))


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", "NULL", "NA", "<NA>", "NaT", "undefined", "#N/A"])
def test_what_parsers_write_for_nothing_is_reported(examine, text):
    _, report = examine({"d.json": as_text("d.json", [{"conversations": turns(text, f" {text}\n")}])})
    assert report["counts"] == {"missing_value": 2}


@pytest.mark.parametrize("text", ["none", "n/a", "N/A", "na", "no", "0", "?", "unknown", "nothing", "nan bread"])
def test_short_answers_are_answers(examine, text):
    assert examine({"d.json": as_text("d.json", [{"conversations": turns("What?", text)}])})[0] == 0


def test_an_image_of_many_rows_is_reported_for_each_of_them(examine):
    rows = [with_image("half.jpg")({"id": number}) for number in range(3)]
    status, report = examine({"d.json": as_text("d.json", rows)})
    assert [(entry["code"], entry["row"]) for entry in report["findings"]] == [
        ("image_corrupt", row) for row in range(3)
    ]
    assert status == 2  # no row is left


def test_without_decoding_and_without_tokenizer(examine, capsys):
    long = FAULTS["too_long"](GOOD)
    files = {"d.json": as_text("d.json", [long, with_image("half.jpg")({"id": 1}), with_image("gone.jpg")({"id": 2})])}
    status, report = examine(files, "--skip_decoding", model=None)
    assert status == 1
    assert report["counts"] == {"image_missing": 1}
    assert report["checked"] == {"tokens": False, "pixels": False}
    assert report["statistics"]["tokens"] is None
    printed = capsys.readouterr().out
    assert "tokens were not counted: that needs a tokenizer, pass --model_name_or_path\n" in printed
    assert "images were not decoded, so broken ones are not known\n" in printed
    status, report = examine(files)
    assert report["counts"] == {"image_corrupt": 1, "image_missing": 1, "too_long": 1}
    assert status == 2


def test_no_folder_for_images(examine):
    status, report = examine({"d.json": as_text("d.json", [GOOD, good_row(1, 1)])}, images=None)
    assert (status, report["counts"]) == (1, {"no_image_folder": 1})


def test_captions_need_an_image_and_no_question(examine):
    rows = [GOOD, {"image": "b.png", "conversations": turns("<image>", "A cat.")}, good_row(1, 1)]
    _, report = examine({"d.json": as_text("d.json", rows)}, "--version", "plain", model=None)
    assert [(entry["code"], entry["row"]) for entry in report["findings"]] == [("caption_without_image", 2)]


def test_images_that_are_seen_otherwise_than_stored_are_counted_and_named(examine, folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(folder / "phone.jpg", exif=exif)
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(folder / "logo.png")
    for number in range(7):
        Image.new("I;16", (8, 6), 60_000).save(folder / f"xray{number}.png")
    names = ["phone.jpg", "logo.png", *(f"xray{number}.png" for number in range(7)), "a.png"]
    rows = [with_image(name)({"id": number}) for number, name in enumerate(names)]
    status, report = examine({"d.json": as_text("d.json", rows)})
    assert status == 0  # they can be trained on
    xrays = [str(folder / f"xray{number}.png") for number in range(5)]
    assert report["statistics"]["image_traits"] == {
        "rotated_by_exif": {"count": 1, "first": [str(folder / "phone.jpg")]},
        "scaled_to_8_bit": {"count": 7, "first": xrays},
        "transparent": {"count": 1, "first": [str(folder / "logo.png")]},
    }
    lines = capsys.readouterr().out.splitlines()
    assert f"1 images turned upright by their EXIF orientation: {folder / 'phone.jpg'}" in lines
    assert f"7 images have more than 8 bits a pixel and are scaled to 8: {', '.join(xrays)} and 2 more" in lines


def test_a_link_to_itself_in_the_folder_stops_nothing(examine, folder):
    loop = folder / "loop.png"
    loop.symlink_to(loop)
    try:
        status, report = examine({"d.json": as_text("d.json", [GOOD, with_image("loop.png")({"id": 1})])})
    finally:
        loop.unlink()
    assert (status, report["counts"]) == (1, {"image_missing": 1})


def test_near_names_are_suggested(examine, folder):
    names = ["A.png", "a.jpg", "images/a.png", "deep\\c.png", "COCO_val2014_a.png"]
    rows = [GOOD, *(with_image(name)({"id": number}) for number, name in enumerate(names))]
    _, report = examine({"d.json": as_text("d.json", rows)})
    there = [folder / name for name in ("a.png", "a.png", "a.png", "deep/c.png", "a.png")]
    assert [error["message"] for error in report["findings"]] == [
        f"image {name!r} not found under {folder}, but {near} is there"
        f"{': leave images/ out of the name' if name.startswith('images/') else ''}; "
        "correct the name or pass --image_folder"
        for name, near in zip(names, there, strict=True)
    ]


@pytest.mark.parametrize("images", ["", "/", None])
def test_absolute_names_need_no_folder(examine, folder, images):
    rows = [with_image(str(folder / "a.png"))({"id": 0})]
    status, report = examine({"d.json": as_text("d.json", rows)}, *(["--image_folder", ""] if images == "" else []),
        images=images)  # fmt: skip
    assert (status, report["statistics"]["images"]) == (0, 1)


SCHEMA = {
    "files": dict,
    "checked": dict,
    "counts": dict,
    "findings": list,
    "statistics": {
        "rows": int,
        "usable_rows": int,
        "rows_without_image": int,
        "images": int,
        "questions": int,
        "questions_per_image": {"mean": float, "min": int, "max": int, "total": int, "histogram": list},
        "answers": {"total": int, "distinct": int, "yes_share": float, "no_share": float, "top": list},
        "tokens": {"mean": float, "min": int, "max": int, "total": int, "histogram": list},
        "supervised_tokens": {"mean": float, "min": int, "max": int, "total": int, "histogram": list},
        "image_traits": dict,
    },
}


def types(values, schema):
    return {
        key: types(value, schema[key]) if isinstance(schema.get(key), dict) else type(value)
        for key, value in values.items()
    }


def test_the_json_report_has_its_keys_and_types(examine):
    _, report = examine({"d.json": as_text("d.json", [GOOD, good_row(1, 1), FAULTS["empty_turn"](good_row(2, 0))])})
    assert types(report, SCHEMA) == SCHEMA
    assert list(report["files"].values()) == [3]
    assert report["checked"] == {"tokens": True, "pixels": True}
    [error] = report["findings"]
    assert set(error) == {"code", "file", "row", "line", "message", "severity"}


def test_the_report_in_words(examine, capsys):
    rows = [good_row(0, 0), good_row(3, 0), good_row(4, 1), *[FAULTS["empty_turn"](good_row(9, 0))] * 5]
    examine({"d.json": as_text("d.json", rows)}, "--shown", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("/d.json: 8 rows")
    assert lines[1:6] == [
        "3 usable rows, 1 of them without image",
        "1 images, 3 questions",
        "questions an image: mean 2.0, from 2 to 2",
        "                 1          0",
        "                 2          1  ########################################",
    ]
    at = lines.index("3 answers, 2 different; yes 0.0 %, no 0.0 %; the most frequent:")
    assert lines[at + 1 :] == [
        "          2  none",
        "          1  Nothing.",
        "5 of 8 rows can't be trained on:",
        "empty_turn: 5",
        "  row 3: turn 2, from 'gpt', is empty; write its text, or remove the row",
        "  row 4: turn 2, from 'gpt', is empty; write its text, or remove the row",
        "  ... and 3 more",
        "0 of 8 rows should be looked at",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --data_path"),
        (["--data_path", "d.json", "--workers", "0"], "argument --workers: 0 is not a positive number"),
        (["--data_path", "d.json", "--version", "v9"], "argument --version: invalid choice: 'v9'"),
    ],
)
def test_wrong_usage_ends_with_two(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_unreadable_files_end_with_two(tmp_path, goldens, capsys):
    (tmp_path / "d.json").write_text("[{]")
    model = goldens / "llava-v1.5-golden"
    for words, message in (
        ([tmp_path / "none.json"], f"error: data file {tmp_path / 'none.json'} not found; make it with"),
        ([tmp_path / "d.json"], "d.json is not valid JSON: line 1, column 3: Expecting property name enclosed in "
            "double quotes; fix it\n"),
        ([f"{tmp_path}/d.json,{tmp_path}/d.json"], "d.json is named twice; leave one of them out\n"),
        ([tmp_path / "d.json", "--model_name_or_path", tmp_path], f"error: {tmp_path}/config.json is missing"),
    ):  # fmt: skip
        assert main(["--data_path", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    trained = tmp_path / "model"
    shutil.copytree(model, trained)
    tower = ["--vision_tower", str(goldens / "clip-vit-tiny-patch14-56")]
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "conversation_template": "v1"}))
    words = ["--data_path", "d.json", "--model_name_or_path", str(trained), "--version", "llava_v0", *tower]
    assert main(words) == 2
    assert "error: --version llava_v0: the model was trained with v1; leave the flag out" in capsys.readouterr().err


def test_many_long_names_and_a_link_that_leads_back_to_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "a.png")
    for loop in ("loop.png", "folder"):
        (tmp_path / "images" / loop).symlink_to(loop)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]
    names = [f"records_with_a_long_name_{number}.json" for number in range(26)]
    for number, name in enumerate(names):
        turns[0]["value"] = f"<image>\nWhat is {number}?"
        (tmp_path / name).write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    assert main(["--data_path", ",".join(names), "--image_folder", "images"]) == 0
    assert "26 usable rows" in capsys.readouterr().out
    record = [{"id": "1", "image": name, "conversations": turns} for name in ("loop.png", "gone.png", "a.png")]
    (tmp_path / "loop.json").write_text(json.dumps(record))
    assert main(["--data_path", "loop.json", "--image_folder", "images"]) == 1
    out = capsys.readouterr().out
    assert "image 'loop.png' not found under images, it is a link to loop.png, which leads nowhere" in out
    assert "image 'gone.png' not found under images, its folder has 2 images, such as 'a.png'" in out


def test_values_of_records_are_printed_without_control_characters(tmp_path, capsys):
    title = "\x1b]0;title\x07"
    good = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"red {title}"}]
    records = [
        {"id": "1", "conversations": good},
        {"id": "2", "conversations": good},
        {"id": "3", "image": [{title: "x" * 10**6}], "conversations": good},
        {"id": "4", "image": f"{title}.png", "conversations": [{"from": "human", "value": "<image>"}, good[1]]},
        {"id": "5", "conversations": [{"from": title, "value": "a"}, good[1]]},
        {title: 5, "\x9b2J": 6},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    assert main(["--data_path", str(path), "--image_folder", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "\\x1b]0;title\\x07" in out
    assert all(character.isprintable() or character == "\n" for character in out + err)
    assert len(out) < 10_000


def test_a_passing_failure_of_reading_is_not_kept(folder, goldens, tmp_path, monkeypatch):
    """Training would take the kept result, and leave the row out although its image is there again."""
    opened = Path.open

    def fail(self, *args, **options):
        if self.name == "a.png":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, *args, **options)

    data = tmp_path / "data.json"
    data.write_text(as_text("data.json", [good_row(number, 0) for number in range(3)]))
    words = ["--data_path", data, "--image_folder", folder, "--model_name_or_path", goldens / "llava-v1.5-golden"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert main(list(map(str, words))) == 1
    assert not (tmp_path / "data.json.checked").exists()
    assert main(list(map(str, words))) == 0
    assert (tmp_path / "data.json.checked").exists()


def test_a_table_is_examined_as_its_json_with_the_lines_of_its_rows(examine, folder, load_program, tmp_path, capsys):
    rows = ["image;вопрос;answer", "a.png;What?;red", "half.jpg;What?;red", "gone.png;What?;NA", "a.png;What?;red"]
    columns = ["--question_column", "вопрос"]
    code, found = examine({"t.csv": "\n".join(rows)}, *columns)
    assert "t.csv: columns are divided by semicolons\n" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("\n".join(rows))
    words = ["--input", str(tmp_path / "t.csv"), "--output", str(tmp_path / "data.json"), *columns]
    assert load_program("task_data_preprocessing.py").main(words) == 0
    expected = examine({"data.json": (tmp_path / "data.json").read_text()})
    assert [(entry["row"], entry["line"], entry["code"]) for entry in found["findings"]] == [
        (1, 3, "image_corrupt"),
        (2, 4, "image_missing"),
        (3, 5, "duplicate"),
    ]
    assert found["findings"][2]["message"].startswith("question, image and answer are those of row 0 (line 2); ")
    assert (code, found["statistics"], found["counts"]) == (
        expected[0], expected[1]["statistics"], expected[1]["counts"]
    )  # fmt: skip


def test_images_inside_a_table_are_written_into_the_image_folder_once(capsys, tmp_path, goldens):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": (goldens / "images/square.png").read_bytes(), "path": None}] * 2
    parquet.write_table(
        pyarrow.table({"image": images, "question": ["What?", "Why?"], "answer": ["a", "b"]}), tmp_path / "t.parquet"
    )
    words = ["--data_path", str(tmp_path / "t.parquet")]
    assert main(words) == 2
    assert "t.parquet holds images; pass --image_folder with the folder into which they are" in capsys.readouterr().err
    for _ in range(2):
        assert main([*words, "--image_folder", str(tmp_path / "new")]) == 0
    assert len(list((tmp_path / "new").iterdir())) == 1
