"""trackio itself, which keeps runs on this machine and asks for no account."""

from __future__ import annotations

import importlib.util
import json

import pytest

if importlib.util.find_spec("trackio") is None:
    pytest.skip("trackio is not installed", allow_module_level=True)

ROWS = [
    {
        "id": answer,
        "image": image,
        "conversations": [{"from": "human", "value": "<image>\nКакого цвета?"}, {"from": "gpt", "value": answer}],
    }
    for image, answer in {"landscape.jpg": "жёлтый", "portrait.png": "зелёный", "square.png": "red"}.items()
]


def test_a_run_is_there_with_accuracy_and_images_of_wrong_answers(train_tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    (tmp_path / "held_out.json").write_text(json.dumps(ROWS))
    words = ["--eval_data_path", tmp_path / "held_out.json", "--eval_strategy", "steps", "--eval_steps", "1"]
    words += ["--max_steps", "2", "--lora_enable", "True", "--lora_r", "4", "--dataloader_num_workers", "0"]
    words += ["--report_to", "trackio", "--project", "colours", "--run_name", "first"]
    assert train_tiny(tmp_path / "out", ROWS, *words) == 0
    assert not [message for message in caplog.messages if message.startswith("--report_to")]

    import trackio

    (run,) = trackio.Api().runs("colours")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("colours", run.name)
    assert run.name == "first"
    assert sum("train/loss" in log for log in logs) == 2
    measured = [log["eval/accuracy"] for log in logs if "eval/accuracy" in log]
    tables = [log["eval/wrong_answers"] for log in logs if "eval/wrong_answers" in log]
    assert len(measured) == len(tables) == 2
    for accuracy, table in zip(measured, tables, strict=True):
        rows = table["_value"]
        assert len(rows) == round(3 * (1 - accuracy)) > 0
        assert {row["question"] for row in rows} == {"Какого цвета?"}
        assert {row["true answer"] for row in rows} <= {"жёлтый", "зелёный", "red"}
        assert {row["image"]["_type"] for row in rows} == {"trackio.image"}
    images = list((tmp_path / "trackio/media").rglob("*.png"))
    assert len(images) == sum(len(table["_value"]) for table in tables)
