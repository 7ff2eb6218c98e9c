"""A Russian table from Excel to the report's page: train, merge, answer, score and report, each on the table itself."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import Image

from llava.eval import model_vqa_loader, vqa_score
from llava.eval.report import __main__ as report
from llava.train import train

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[1] / "playground/llava-tiny"
HEADER = ("файл", "вопрос", "ответ", "тип")
IMAGES = {"фото 1.jpg": "red", "фото 2.jpg": "blue", "разное/вид 3.jpg": "green"}
ROWS = [
    ("фото 1.jpg", "Какого цвета фон?", "красный", "цвет"),
    ("фото 1.jpg", "Здесь есть круг; или квадрат?", "нет", "наличие"),
    ("фото 2.jpg", "Какого цвета фон?", "синий", "цвет"),
    ("фото 2.jpg", "Это «фото 2»?", "да", "наличие"),
    ("разное/вид 3.jpg", "Какого цвета фон?", "зелёный", "цвет"),
    ("разное/вид 3.jpg", "Сколько здесь углов?", "4", "число"),
]
COLUMNS = ["--image_column", "файл", "--question_column", "вопрос", "--answer_column", "ответ"]
QUESTION_COLUMNS = COLUMNS[:4]
ENCODING = ["--encoding", "cp1251"]
SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"


def write_xlsx(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write texts as a workbook of one sheet, the fewest parts that the format asks for."""
    cells = ("".join(f'<c t="inlineStr"><is><t>{escape(text)}</t></is></c>' for text in row) for row in rows)
    sheet = "".join(f"<row>{row}</row>" for row in cells)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{TYPES}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{TYPES}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" '
        f'Type="{LINKS}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{SHEET}" xmlns:r="{LINKS}"><sheets><sheet name="Лист1" sheetId="1" '
        'r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" '
        f'Type="{LINKS}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEET}"><sheetData>{sheet}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{content}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the images, the table as Excel writes it on a Russian Windows, and the same as .xlsx."""
    folder = tmp_path_factory.mktemp("Мои данные")
    for name, colour in IMAGES.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(folder / "images" / name)
    with (folder / "таблица.csv").open("w", encoding="cp1251", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([HEADER, *ROWS])
    write_xlsx(folder / "таблица.xlsx", [HEADER, *ROWS])
    return folder


@pytest.fixture(scope="module")
def as_json(folder, load_program):
    """Return the folder after the step that tables make optional: data.json and questions.jsonl lie there."""
    program, table = load_program("task_data_preprocessing.py").main, str(folder / "таблица.csv")
    words = ["--input", table, *ENCODING]
    assert program([*words, *COLUMNS, "--output", str(folder / "data.json")]) == 0
    infer = ["--mode", "infer", "--output", str(folder / "questions.jsonl")]
    assert program([*words, *QUESTION_COLUMNS, *infer, "--keep", "ответ", "тип"]) == 0
    lines = map(json.loads, (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    truth = [{**line, "answer": line["ответ"], "kind": line["тип"]} for line in lines]
    (folder / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in truth), encoding="utf-8")
    return folder


def finetune(folder, data, output, *flags):
    words = ["--model_name_or_path", TINY, "--data_path", folder / data, "--image_folder", folder / "images"]
    words += ["--output_dir", folder / output, "--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16"]
    words += ["--learning_rate", "2e-3", "--mm_projector_lr", "2e-4", "--max_steps", "6", "--logging_steps", "1"]
    words += ["--per_device_train_batch_size", "3", "--save_strategy", "no", "--use_cpu", "True"]
    words += ["--report_to", "none", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    assert train.main([str(word) for word in (*words, *flags)]) == 0
    log = (folder / output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, log) if "loss" in line]


@pytest.fixture(scope="module")
def merged(folder, load_program):
    """Return the model that was trained on the Excel file, merged."""
    finetune(folder, "таблица.xlsx", "lora", *COLUMNS)
    words = ["--model-path", folder / "lora", "--model-base", TINY, "--save-model-path", folder / "merged"]
    assert load_program("scripts/merge_lora_weights.py").main([*map(str, words), "--device", "cpu"]) == 0
    return folder / "merged"


def answer(model, folder, questions, output, *flags):
    words = ["--model-path", model, "--question-file", folder / questions, "--image-folder", folder / "images"]
    words += ["--answers-file", folder / output, "--max_new_tokens", "12", "--device", "cpu", "--with-scores"]
    assert model_vqa_loader.main([str(word) for word in (*words, *flags)]) == 0
    return (folder / output).read_bytes()


def test_excel_csv_and_json_train_the_same(as_json, merged):
    excel = [json.loads(line) for line in (as_json / "lora/train_log.jsonl").read_text().splitlines()]
    excel_losses = [line["loss"] for line in excel if "loss" in line]
    assert finetune(as_json, "таблица.csv", "lora-csv", *COLUMNS, *ENCODING) == excel_losses
    assert finetune(as_json, "data.json", "lora-json") == excel_losses
    assert len(excel_losses) == 6
    runs = [json.loads((as_json / name / "training.json").read_text())["run"] for name in ("lora", "lora-json")]
    assert runs[0] == runs[1]


def test_excel_csv_and_json_are_answered_the_same(as_json, merged):
    excel = answer(merged, as_json, "таблица.xlsx", "excel.jsonl", *QUESTION_COLUMNS)
    assert answer(merged, as_json, "таблица.csv", "csv.jsonl", *QUESTION_COLUMNS, *ENCODING) == excel
    assert answer(merged, as_json, "questions.jsonl", "json.jsonl") == excel
    records = [json.loads(line) for line in excel.splitlines()]
    assert [record["question_id"] for record in records] == list(range(6))
    assert [record["prompt"] for record in records] == [question for _, question, _, _ in ROWS]


@pytest.fixture(scope="module")
def answers(folder, merged):
    """Return an answer file in which some answers are right, whatever six steps have taught."""
    path = folder / "answers.jsonl"
    answer(merged, folder, "таблица.xlsx", path.name, *QUESTION_COLUMNS)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line, text in zip(lines, ("красный", "Да", "Синий.", "да", "жёлтый", "4"), strict=True):
        line["text"] = text
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_scores_are_those_through_json(as_json, answers, tmp_path):
    words, found = ["--answers-file", str(answers)], {}
    kinds = ["--kind-key", "тип"]
    for name, more in {
        "таблица.xlsx": [*COLUMNS, *kinds],
        "таблица.csv": [*COLUMNS, *kinds, *ENCODING],
        "truth.jsonl": [],
    }.items():
        output = tmp_path / "scores.json"
        assert vqa_score.main([*words, "--annotations", str(as_json / name), "--json", str(output), *more]) == 0
        found[name] = json.loads(output.read_text(encoding="utf-8")) | {"annotations": None}
    assert found["таблица.xlsx"] == found["таблица.csv"] == found["truth.jsonl"]
    [scores] = found["таблица.xlsx"]["files"]
    assert scores["overall"]["accuracy"] == pytest.approx(4 / 6)
    assert {kind: score["accuracy"] for kind, score in scores["by_kind"].items()} == pytest.approx(
        {"цвет": 2 / 3, "наличие": 1 / 2, "число": 1.0}
    )


def test_the_page_holds_texts_and_images(as_json, answers, tmp_path, caplog):
    pages = []
    shared = ["--answers", str(answers), "--images", str(as_json / "images"), "--workers", "0"]
    for questions, truth, more in (
        ("таблица.xlsx", "таблица.xlsx", [*COLUMNS, "--kind-key", "тип"]),
        ("questions.jsonl", "truth.jsonl", []),
    ):
        words = ["--questions", str(as_json / questions), "--annotations", str(as_json / truth), *more]
        assert report.main([*shared, *words, "--output", str(tmp_path / "page.html")]) == 0
        pages.append((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert caplog.text.count("row numbers") == 1  # the table is read twice, and described once
    assert pages[0] == pages[1]
    for texts in (*ROWS, ("Синий.", "жёлтый")):
        assert all(text in pages[0] for text in texts)
    encoded = re.search(r"<script[^>]*id=\"thumbnails\"[^>]*>(.*?)</script>", pages[0], re.DOTALL)[1].split()
    assert len(encoded) == len(IMAGES)
    sizes = [Image.open(io.BytesIO(base64.b64decode(line))).size for line in encoded]
    assert sizes == [(64, 48)] * len(IMAGES)
