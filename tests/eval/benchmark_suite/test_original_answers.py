"""The suite scores answers of the original's models, put where the original puts them, to the digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def run(data: Any, names: str, tmp_path: Path, model: str = "llava-v1.5-13b") -> dict[str, Any]:
    """Score existing answers; return the results by benchmark."""
    output = tmp_path / "suite.json"
    assert data(names, "--score-only", "--json", output, model=model) == 0
    return {result["benchmark"]: result for result in json.loads(output.read_text())["results"]}


def figures(result: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in result["figures"]}


def test_pope(originals, tmp_path, capsys):
    result = run(originals, "pope", tmp_path)["pope"]
    assert figures(result)["F1 score, random"] == pytest.approx(87.32, abs=0.005)
    assert figures(result)["accuracy, random"] == pytest.approx(87.92, abs=0.005)
    assert (result["questions"], result["scored"]) == (2910, 2766)
    out = capsys.readouterr().out
    assert "POPE            2910    2766  F1 score, random  87.32 %" in out
    assert "144 (10000011, " in out


def test_scienceqa(originals, shared_path, tmp_path):
    result = run(originals, "scienceqa", tmp_path)["scienceqa"]
    expected = json.loads(shared_path("eval/scienceqa/expected.json").read_text())
    assert figures(result)["accuracy, with image"] == pytest.approx(expected["accuracy_with_image"])
    assert figures(result)["accuracy"] == pytest.approx(expected["accuracy"])
    assert result["scored"] == expected["questions"] == 1200


def test_gqa_predictions(originals, tmp_path):
    """GQA's own questions are not here: their answers are made up, right for the first half."""
    questions = originals.answers("gqa/llava_gqa_testdev_balanced.jsonl")
    answers = originals.answers("gqa/answers/llava-v1.5-13b.jsonl")
    truths = {
        question["question_id"]: {
            "question": question["text"].partition("\n")[0],
            "imageId": question["image"].removesuffix(".jpg"),
            "answer": answer["text"].rstrip(".").lower() if number < 400 else "nothing",
        }
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    }
    place = originals.folder / "gqa/data/testdev_balanced_questions.json"
    place.parent.mkdir()
    place.write_text(json.dumps(truths))
    originals.write_lines("gqa/answers/llava_gqa_testdev_balanced/llava-v1.5-13b/merge.jsonl", answers)
    result = run(originals, "gqa", tmp_path)["gqa"]
    assert result["figures"][0]["value"] == 50
    predictions = json.loads(Path(result["upload"]).read_text())
    assert predictions == [
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()} for answer in answers
    ]


def test_submission_files(originals, shared_path, tmp_path):
    results = run(originals, "vizwiz", tmp_path) | run(originals, "mmvet", tmp_path, model="llava-v1.5-7b")
    expected = {
        "vizwiz": "eval/vizwiz/answers_upload/llava-v1.5-13b.json",
        "mmvet": "eval/mm-vet/results/llava-v1.5-7b.json",
    }
    for name, path in expected.items():
        written = json.loads(Path(results[name]["upload"]).read_text())
        assert written == json.loads(shared_path(path).read_text())
        assert results[name]["figures"] == []
