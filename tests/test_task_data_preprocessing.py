"""The preprocessing program: files in, files out, exit codes, messages."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
        "assert not {'torch', 'transformers', 'numpy', 'pandas', 'PIL', 'pyarrow', 'python_calamine'} & sys.modules.keys()"
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
