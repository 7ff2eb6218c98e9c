"""The preprocessing program: files in, files out, exit codes, messages."""

import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "task_data_preprocessing.py"
TABLE = """\
,image_id,question,question_id,answer,kind
0,104406,Is there railing?,104406001,yes,exist
1,104406, Why  so?,104406002,n/a,why
2,7,"What, then?",7000,"red
and blue",what
"""
WRONG = "image_id,question,question_id,answer\n1,,2,yes\n"
RECORD_0 = {
    "id": "0",
    "image": "COCO_val2014_000000104406.jpg",
    "conversations": [{"from": "human", "value": "<image>\nIs there railing?"}, {"from": "gpt", "value": "yes"}],
    "question_id": 104406001,
}


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    """The program's `main`, loaded from its file."""
    spec = importlib.util.spec_from_file_location("task_data_preprocessing", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An own working directory with `t.csv`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_no_arguments_use_the_original_paths(main, folder, capsys):
    (folder / "playground/data_train").mkdir(parents=True)
    (folder / "t.csv").rename(folder / "playground/data_train/Train_Qs.csv")
    assert main([]) == 0
    assert listing(folder) == ["playground/data_train/Train_Qs.csv", "playground/data_train/data.json"]
    records = json.loads((folder / "playground/data_train/data.json").read_text(encoding="utf-8"))
    assert records[0] == RECORD_0
    assert [record["id"] for record in records] == ["0", "1", "2"]
    assert records[1]["conversations"] == [
        {"from": "human", "value": "<image>\n Why  so?"},
        {"from": "gpt", "value": "n/a"},
    ]
    assert records[2]["conversations"][1]["value"] == "red\nand blue"
    assert capsys.readouterr().out == (
        "wrote playground/data_train/data.json: 3 rows, 2 images, 1.50 questions per image (at most 2)\n"
    )


def test_infer_defaults_and_kept_columns(main, folder):
    (folder / "playground/data_infer").mkdir(parents=True)
    (folder / "t.csv").rename(folder / "playground/data_infer/Test_Qs.csv")
    assert main(["--mode", "infer", "--keep", "kind", "answer"]) == 0
    lines = (folder / "playground/data_infer/questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question_id": 104406001, "image": "COCO_val2014_000000104406.jpg", "text": "Is there railing?",
         "kind": "exist", "answer": "yes"},
        {"question_id": 104406002, "image": "COCO_val2014_000000104406.jpg", "text": " Why  so?",
         "kind": "why", "answer": "n/a"},
        {"question_id": 7000, "image": "COCO_val2014_000000000007.jpg", "text": "What, then?",
         "kind": "what", "answer": "red\nand blue"},
    ]  # fmt: skip


def test_table_without_answers(main, folder):
    (folder / "t.csv").write_text("img,text,id\n5,What?,1\n", encoding="utf-8")
    flags = ["--image_id_column", "img", "--question_column", "text", "--question_id_column", "id"]
    names = ["--image_name", "{id}.png", "--input", "t.csv", "--output", "new/q.jsonl"]
    assert main(["--mode", "infer", *flags, *names]) == 0
    assert (folder / "new/q.jsonl").read_text() == '{"question_id": 1, "image": "5.png", "text": "What?"}\n'


def test_other_answer_column_and_keep_in_training(main, folder):
    arguments = ["--input", "t.csv", "--output", "o.json", "--answer_column", "kind", "--keep", "answer"]
    assert main(arguments) == 0
    record = json.loads((folder / "o.json").read_text())[0]
    assert record["conversations"][1]["value"] == "exist"
    assert record["answer"] == "yes"


def test_validation_share_is_split_by_image(main, folder, capsys):
    arguments = ["--input", "t.csv", "--output", "o.json", "--val_share", "0.5"]
    assert main(arguments) == 0
    assert listing(folder) == ["o.json", "o_val.json", "t.csv"]
    train, val = (json.loads((folder / name).read_text()) for name in ("o.json", "o_val.json"))
    assert sorted(record["id"] for record in train + val) == ["0", "1", "2"]
    assert not {record["image"] for record in train} & {record["image"] for record in val}
    out = capsys.readouterr().out
    assert "wrote o.json: " in out
    assert "wrote o_val.json: " in out
    assert main([*arguments, "--val_output", "v.json", "--seed", "5"]) == 0
    assert (folder / "v.json").is_file()


def test_bad_table_leaves_the_previous_output(main, folder, capsys):
    (folder / "t.csv").write_text(WRONG)
    (folder / "o.json").write_text("old")
    assert main(["--input", "t.csv", "--output", "o.json"]) == 1
    assert capsys.readouterr().err == (
        "error: t.csv: 1 bad row\n  line 2: question is empty\n"
        "Correct or remove these rows in the table, then run again.\nNothing was written.\n"
    )
    assert listing(folder) == ["o.json", "t.csv"]
    assert (folder / "o.json").read_text() == "old"


def test_missing_table(main, folder, capsys):
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: playground/data_train/Train_Qs.csv: no such file; ")
    assert listing(folder) == ["t.csv"]


def test_images_are_checked_when_asked(main, folder, capsys):
    (folder / "images").mkdir()
    (folder / "images/7.jpg").touch()
    arguments = ["--input", "t.csv", "--output", "o.json", "--image_name", "{id}.jpg", "--check_images", "images"]
    assert main(arguments) == 1
    assert (
        "1 bad row\n  line 2: image '104406.jpg' not found under images, its folder has 1 image, such as '7.jpg'\n"
        in capsys.readouterr().err
    )
    (folder / "images/104406.jpg").touch()
    assert main(arguments) == 0


def test_full_disk_keeps_every_previous_output(main, folder, capsys, monkeypatch):
    (folder / "o.json").write_text("old")
    (folder / "o_val.json").write_text("old val")
    calls = []

    def fail_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_second)
    assert main(["--input", "t.csv", "--output", "o.json", "--val_share", "0.5"]) == 1
    assert capsys.readouterr().err == (
        "error: cannot write o.json and o_val.json: No space left on device. Existing files are unchanged; "
        "free disk space, or choose another path with --output.\n"
    )
    assert listing(folder) == ["o.json", "o_val.json", "t.csv"]
    assert (folder / "o.json").read_text() == "old"
    assert (folder / "o_val.json").read_text() == "old val"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val_share", "1"], "--val_share: 1 does not lie between 0 and 1, for example 0.05"),
        (["--val_share", "x"], "--val_share: invalid"),
        (["--val_output", "v"], "--val_output and --seed need --val_share; add it or leave them out"),
        (["--seed", "1"], "--val_output and --seed need --val_share; add it or leave them out"),
        (["--mode", "infer", "--val_share", "0.1", "--answer_column", "a"],
         "--answer_column, --val_share has no effect with --mode infer; leave it out"),
        (["--input", "a", "--output", "a"], "--output a would write over --input a; choose another --output"),
        (["--val_share", "0.1", "--output", "a", "--val_output", "./a"],
         "--val_output a and --output a are the same file; change one"),
        (["--keep", "image"], "--keep image: every record has that key already; rename the column or leave it out"),
        (["--keep", "k", "k"], "--keep k: every record has that key already"),
        (["--mode", "infer", "--keep", "text"], "--keep text: every record has that key already"),
        (["--delimiter", "ab"], "--delimiter: 'ab' is not a character between columns; use ',' ';' '|' or tab"),
        (["--encoding", "cp12"], "--encoding: 'cp12' is not an encoding; use one such as utf-8, cp1251 or utf-16"),
        (["--encoding", "base64"], "--encoding: 'base64' is not an encoding; use one such as utf-8"),
        (["--image_name", "a.jpg"], "--image_name: 'a.jpg' gives every image one name; write it like"),
    ],
)  # fmt: skip
def test_wrong_usage(main, folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert listing(folder) == ["t.csv"]


def test_help_names_every_default_and_an_example():
    result = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True, check=True)
    text = " ".join(result.stdout.split())
    assert "python task_data_preprocessing.py --mode infer --input new.csv" in text
    assert text.count("(default: ") == 17


def test_runs_from_anywhere_without_heavy_imports(folder):
    code = (
        f"import runpy, sys; sys.argv = ['x', '--input', 't.csv', '--output', 'o.json']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'PIL', 'pyarrow', 'python_calamine'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((folder / "o.json").read_text())[0] == RECORD_0


def test_real_table(main, folder, shared_path):
    path = shared_path("data/Train_Qs.csv")
    assert main(["--input", str(path), "--output", "o.json"]) == 0
    text = (folder / "o.json").read_text(encoding="utf-8")
    records = json.loads(text)
    assert len(records) == 66_668
    assert text.count("\n") == 66_670
    assert records[0] == RECORD_0
    assert records[14364]["conversations"][1] == {"from": "gpt", "value": "n/a"}
    assert [record["id"] for record in records] == [str(row) for row in range(66_668)]


@pytest.fixture
def russian(folder) -> Path:
    """A table as Excel in Russian exports it: cp1251, semicolons, image names with spaces, no ids, empty rows."""
    text = (
        "фото;вопрос;ответ\r\nфото 1.jpg;Какого цвета, машина?;красная\r\nфото 2.jpg;Сколько людей?;2\r\n;;\r\n;;\r\n"
    )
    (folder / "вопросы.csv").write_bytes(text.encode("cp1251"))
    return folder


RUSSIAN_COLUMNS = ["--image_column", "фото", "--question_column", "вопрос", "--answer_column", "ответ"]


def test_each_message_about_a_russian_table_leads_to_the_next_flag(main, russian, capsys):
    command = ["--input", "вопросы.csv", "--output", "o.json"]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        "error: вопросы.csv: not UTF-8: byte 0xf4 at offset 0 (line 1); it looks like cp1251 ('фото вопрос ответ'): "
        "pass --encoding cp1251\nNothing was written.\n"
    )
    command += ["--encoding", "cp1251"]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        "error: вопросы.csv: no columns 'image_id', 'question', 'answer'; the header has 'фото', 'вопрос', 'ответ'; "
        "name the right ones with --image_column, --question_column and --answer_column\nNothing was written.\n"
    )
    assert main([*command, *RUSSIAN_COLUMNS]) == 0
    assert capsys.readouterr().out == (
        "вопросы.csv: columns are divided by semicolons\n"
        "вопросы.csv: no column 'question_id': the ids of the questions are row numbers, from 0\n"
        "вопросы.csv: фото holds file names ('фото 1.jpg'), which are taken as they are\n"
        "wrote o.json: 2 rows, 2 images, 1.00 questions per image (at most 1)\n"
    )
    assert json.loads((russian / "o.json").read_text(encoding="utf-8"))[0] == {
        "id": "0",
        "image": "фото 1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nКакого цвета, машина?"},
            {"from": "gpt", "value": "красная"},
        ],
        "question_id": 0,
    }


@pytest.mark.parametrize("name", ["t.xlsx", "t.parquet", "t.tsv"])
def test_one_table_in_any_format_gives_the_same_files(main, folder, name):
    frame = pandas.read_csv(folder / "t.csv", dtype=str, keep_default_na=False)
    {"t.xlsx": frame.to_excel, "t.parquet": frame.to_parquet, "t.tsv": partial(frame.to_csv, sep="\t")}[name](
        folder / name, index=False
    )
    for mode in ("train", "infer"):
        outputs = []
        for table in ("t.csv", name):
            assert main(["--mode", mode, "--input", table, "--output", "o", "--keep", "kind"]) == 0
            outputs.append((folder / "o").read_bytes())
        assert outputs[0] == outputs[1]


def save_image_table(path: Path, *, answer: str = "a") -> bytes:
    """A parquet table with an image called a.jpg; returns the image."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "JPEG")
    frame = {"image": [{"bytes": stream.getvalue(), "path": "a.jpg"}], "question": ["q"], "answer": [answer]}
    pandas.DataFrame(frame).to_parquet(path)
    return stream.getvalue()


def test_images_of_a_table_are_written_beside_the_output(main, folder, capsys):
    image = save_image_table(folder / "t.parquet")
    assert main(["--input", "t.parquet", "--output", "new/o.json", "--check_images", "."]) == 0
    assert listing(folder) == ["new/images/a.jpg", "new/o.json", "t.csv", "t.parquet"]
    assert (folder / "new/images/a.jpg").read_bytes() == image
    assert "\nwrote 1 images into new/images\nwrote new/o.json: 1 rows" in capsys.readouterr().out
    assert main(["--input", "t.parquet", "--output", "o.json", "--image_folder", "pics"]) == 0
    assert (folder / "pics/a.jpg").read_bytes() == image


def test_nothing_is_written_where_an_image_would_replace_another(main, folder, capsys):
    save_image_table(folder / "t.parquet")
    (folder / "images").mkdir()
    (folder / "images/a.jpg").write_bytes(b"mine")
    assert main(["--input", "t.parquet", "--output", "o.json"]) == 1
    assert "image 'a.jpg' of the table is another file than the one there" in capsys.readouterr().err
    assert listing(folder) == ["images/a.jpg", "t.csv", "t.parquet"]


def test_no_image_of_a_table_with_a_bad_row_is_written(main, folder):
    save_image_table(folder / "t.parquet", answer=" ")
    assert main(["--input", "t.parquet", "--output", "o.json"]) == 1
    assert listing(folder) == ["t.csv", "t.parquet"]


def test_an_image_that_cannot_be_written_names_the_folder(main, folder, capsys):
    save_image_table(folder / "t.parquet")
    (folder / "images").touch()
    assert main(["--input", "t.parquet", "--output", "o.json"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write images: ")
    assert listing(folder) == ["images", "t.csv", "t.parquet"]


def test_flags_without_effect_on_this_table(main, folder, capsys):
    assert main(["--input", "t.csv", "--output", "o.json", "--image_folder", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: t.csv names files and holds no images: --image_folder has no effect; leave it out\n"
        "Nothing was written.\n"
    )
    (folder / "l.csv").write_text('image,question,answers\n1.jpg,q,"[""a"",""b""]"\n')
    assert main(["--input", "l.csv", "--output", "o.json", "--keep", "answers"]) == 1
    assert "--keep answers: records with several answers have that key already" in capsys.readouterr().err


def test_all_answers_are_kept_beside_the_most_frequent(main, folder):
    (folder / "l.csv").write_text('image,question,answers\n1.jpg,q,"[""no"",""yes"",""yes""]"\n1.jpg,q,"[""x""]"\n')
    assert main(["--input", "l.csv", "--output", "o.json"]) == 0
    first, second = json.loads((folder / "o.json").read_text())
    assert first["conversations"][1]["value"] == "yes"
    assert first["answers"] == ["no", "yes", "yes"]
    assert "answers" not in second
