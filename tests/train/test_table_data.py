"""Training on a table is training on the JSON that is written of it: losses, checks, resuming, lines in messages."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest

from llava.data.doctor.images import check_images
from llava.data.records import DataError
from llava.model.adapter.lora import ADAPTER_FILES
from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.train import data_setup, train
from llava.train.data_setup import load_data
from llava.train.flags.arguments import DataArguments
from llava.train.flags.training_arguments import TrainingArguments

HEADER = ("файл", "вопрос", "ответ", "другой ответ")
COLUMNS = {"image_column": "файл", "question_column": "вопрос", "answer_column": ["ответ"], "encoding": "cp1251"}
ROWS = [
    ("square.png", "Что это?", "квадрат", "поле"),
    ("tiny.png", "Это кот?", "нет", "да"),
    ("gray.jpg", "Сколько домов?", "два", "три"),
    ("square.png", "Какой цвет?", "синий", "белый"),
]


def write_table(path, rows=ROWS, header=HEADER):
    with path.open("w", encoding="cp1251", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([header, *rows])
    return path


def flags(**columns):
    values = {f"--{name}": value if isinstance(value, list) else [value] for name, value in columns.items()}
    return [word for flag, words in values.items() for word in (flag, *words)]


@pytest.fixture
def run(goldens, tmp_path):
    """Return the function (data file, output directory, *flags) -> exit code of a short run of LoRA."""

    def run(data, output, *more):
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", data, "--output_dir", output]
        words += ["--image_folder", goldens / "images", "--use_cpu", "True", "--report_to", "none", "--lora_enable"]
        words += ["True", "--lora_r", "4", "--logging_steps", "1", "--model_max_length", "256", "--learning_rate"]
        words += ["1e-3", "--per_device_train_batch_size", "2", "--disable_tqdm", "True", "--num_train_epochs", "1"]
        return train.main([str(word) for word in (*words, "--save_strategy", "no", *more)])

    return run


def losses(output):
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def as_json(load_program, tmp_path):
    """Return the function (table) -> the JSON that task_data_preprocessing.py writes of it."""

    def convert(table):
        words = ["--input", str(table), "--output", str(tmp_path / "data.json"), *flags(**COLUMNS)]
        assert load_program("task_data_preprocessing.py").main(words) == 0
        return tmp_path / "data.json"

    return convert


def test_a_run_on_a_table_is_the_run_on_its_json(run, as_json, tmp_path):
    table = write_table(tmp_path / "table.csv")
    assert run(as_json(table), tmp_path / "json") == 0
    assert run(table, tmp_path / "table", *flags(**COLUMNS)) == 0
    assert losses(tmp_path / "table") == losses(tmp_path / "json")
    assert len(losses(tmp_path / "json")) == 2
    one, two = (open_tensor_file(tmp_path / name / ADAPTER_FILES[0]) for name in ("json", "table"))
    assert all((one[name] == two[name]).all() for name in one)
    manifests = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("json", "table")]
    assert manifests[0]["run"] == manifests[1]["run"]
    assert manifests[1]["DataArguments"]["encoding"] == "cp1251"


def test_a_run_resumes_with_the_same_rows_only(run, as_json, tmp_path, capsys):
    table, output = write_table(tmp_path / "table.csv"), tmp_path / "out"
    saved = ["--save_strategy", "steps", "--save_steps", "1"]
    assert run(as_json(table), output, *saved) == 0
    assert run(table, output, *saved, "--num_train_epochs", "2", *flags(**COLUMNS)) == 0
    assert len(losses(output)) == 4
    other = {**COLUMNS, "answer_column": "другой ответ"}
    assert run(table, output, *saved, "--num_train_epochs", "3", *flags(**other)) == 1
    assert "belongs to another run: data_digest was" in capsys.readouterr().err
    write_table(table, ROWS[::-1])
    assert run(table, output, *saved, "--num_train_epochs", "3", *flags(**COLUMNS)) == 1
    assert "belongs to another run: data_digest was" in capsys.readouterr().err


def test_a_table_to_validate_on(run, as_json, tmp_path):
    table = write_table(tmp_path / "table.csv")
    validation = write_table(tmp_path / "other.csv", [("landscape.jpg", "Что это?", "парк", "")])
    more = ["--eval_data_path", validation, "--eval_strategy", "epoch", *flags(**COLUMNS)]
    assert run(f"{table}", tmp_path / "out", *more) == 0
    assert '"eval_loss"' in (tmp_path / "out/train_log.jsonl").read_text()


@pytest.fixture
def load(tmp_path, goldens, tokenizer, monkeypatch):
    """Return the function (**options) -> encoded rows of `table.csv`; `decoded` counts the passes over its images."""
    output = tmp_path / "out"
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True, report_to="none", model_max_length=256)
    config = SimpleNamespace(conversation_template="vicuna_v1", mm_use_im_start_end=False)

    def counting(paths, **options):
        run.decoded += 1
        return check_images(paths, **options)

    def run(rank="0", data_path=tmp_path / "table.csv", **options):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(data_setup, "check_images", counting)
        data = DataArguments(data_path=str(data_path), image_folder=str(goldens / "images"), **(COLUMNS | options))
        return load_data(data, arguments, SimpleNamespace(config=config, tokenizer=tokenizer), 16)

    run.decoded = 0
    return run


def test_a_table_is_checked_again_when_it_or_its_columns_change(load, tmp_path):
    write_table(tmp_path / "table.csv")
    assert load() == load()
    assert load.decoded == 1
    other = load(answer_column=["другой ответ"])
    assert load.decoded == 2
    assert other != load()
    write_table(tmp_path / "table.csv", ROWS[:3])
    assert len(load()) == 3
    assert load.decoded == 4


def test_row_errors_name_the_line_of_the_table(load, tmp_path, caplog):
    write_table(tmp_path / "table.csv", [*ROWS, ("нет.jpg", "Две\nстроки?", "да", ""), ("нет.jpg", "Что?", "да", "")])
    with pytest.raises(DataError) as stop:
        load()
    lines = str(stop.value).splitlines()
    assert lines[0] == f"{tmp_path / 'table.csv'}: 2 of 6 rows can't be used"
    assert lines[1].startswith("  row 4 (line 6): image 'нет.jpg' not found under ")
    assert lines[2].startswith("  row 5 (line 8): image 'нет.jpg' not found under ")
    assert lines[3:] == ["fix these rows, or pass --on_bad_row skip"]
    assert len(load(on_bad_row="skip")) == 4
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["line"], entry["code"]) for entry in skipped] == [
        (4, 6, "image_missing"),
        (5, 8, "image_missing"),
    ]


def test_json_and_tables_are_trained_on_together(load, as_json, tmp_path):
    data = as_json(write_table(tmp_path / "table.csv"))
    both = load(data_path=f"{data},{tmp_path / 'table.csv'}")
    assert both[:4] == both[4:]
    assert len(both) == 8


def test_what_was_found_out_is_said_once(load, tmp_path, caplog):
    write_table(tmp_path / "table.csv")
    with caplog.at_level("INFO"):
        load()
    notes = [record for record in caplog.records if "row numbers" in record.getMessage()]
    assert [record.levelname for record in notes] == ["INFO"]  # the level that the first process alone prints
