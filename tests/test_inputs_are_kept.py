"""No program writes over one of its inputs: exit code 2 before any work, both flags named, every byte as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.data.doctor import __main__ as doctor
from llava.eval import eval_gpt_review_bench, eval_science_qa, model_vqa_loader, model_vqa_mmbench, vqa_score
from llava.eval.report import __main__ as report
from llava.model import plan
from llava.train import train

JPEG = b"\xff\xd8\xff\xe0 not decoded"
ASK = ["--model-path", "base", "--image-folder", "images", "--device", "cpu", "--question-file"]
TRAIN = ["--model_name_or_path", "base", "--data_path", "data.json", "--image_folder", "images", "--use_cpu", "True"]
MERGE = ["--model-path", "lora", "--overwrite"]
REPORT = [
    "--answers",
    "a.jsonl",
    "other.jsonl",
    "--questions",
    "q.jsonl",
    "--images",
    "images",
    "--annotations",
    "T.csv",
]
REVIEW = ["--question", "q.jsonl", "--context", "q.jsonl", "--rule", "data.json"]
LINKED = "(the same on disk); choose another"

CASES = [  # program, command line, part of its message
    ("task_data_preprocessing.py", ["--input", "T.csv", "--output", "images/../T.csv"], f"--input T.csv {LINKED}"),
    (
        "task_data_preprocessing.py",
        ["--input", "T.csv", "--output", "images/x.jpg"],
        "--output images/x.jpg is an image",
    ),
    (
        "task_data_preprocessing.py",
        ["--input", "T.csv", "--output", "n.json", "--val_share", "0.5", "--val_output", "T.csv"],
        "--val_output T.csv would write over --input T.csv; choose another --val_output",
    ),
    (
        doctor,
        ["--data_path", "other.jsonl,data.json", "--json", "data.json"],
        "--json data.json would write over --data_p",
    ),
    (doctor, ["--data_path", "data.json", "--json", "linked.json"], f"--data_path data.json {LINKED} --json"),
    (
        doctor,
        ["--data_path", "data.json", "--model_name_or_path", "base", "--json", "base/config.json"],
        "--json base/config.json would write over config.json of --model_name_or_path base; choose another --json",
    ),
    (doctor, ["--data_path", "T.csv", "--json", "T.csv"], "--json T.csv would write over --data_path T.csv; choose"),
    (
        doctor,
        ["--data_path", "saved", "--json", "saved/state.json"],
        "--json saved/state.json would write over --data_path saved/state.json; choose another --json",
    ),
    (train, [*TRAIN, "--data_path", "saved", "--output_dir", "saved"], "would write over --data_path saved; choose"),
    (train, [*TRAIN, "--output_dir", "base"], "--output_dir base would write over --model_name_or_path base; choose"),
    (train, [*TRAIN, "--output_dir", "images"], "--output_dir images would write over --image_folder images; choose"),
    (
        train,
        [*TRAIN, "--lora_enable", "True", "--lora_weight_path", "lora", "--output_dir", "lora"],
        "--output_dir lora would write over --lora_weight_path lora; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--lora_enable", "True", "--lora_weight_path", "out/checkpoint-5", "--output_dir", "out"],
        "--lora_weight_path out/checkpoint-5 with its checkpoint-5; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--output_dir", "out/checkpoint-5", "--resume_from_checkpoint", "out/checkpoint-5"],
        "would write over --resume_from_checkpoint out/checkpoint-5; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--data_path", "out/train_log.jsonl", "--output_dir", "out"],
        "would write over --data_path out/train_log.jsonl with its train_log.jsonl; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--eval_data_path", "out/train_log.jsonl", "--eval_strategy", "epoch", "--output_dir", "out"],
        "would write over --eval_data_path out/train_log.jsonl with its train_log.jsonl; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--deepspeed", "out/config.json", "--output_dir", "out"],
        "would write over --deepspeed out/config.json with its config.json; choose another --output_dir",
    ),
    (
        train,
        [*TRAIN, "--pretrain_mm_mlp_adapter", "out/mm_projector.bin", "--output_dir", "out"],
        "--pretrain_mm_mlp_adapter out/mm_projector.bin with its mm_projector.bin; choose another --output_dir",
    ),
    ("scripts/merge_lora_weights.py", [*MERGE, "--save-model-path", "lora"], "over --model-path lora; choose another"),
    (
        "scripts/merge_lora_weights.py",
        [*MERGE, "--save-model-path", "base"],
        "--save-model-path base would write over base, the base of --model-path lora; choose another --save-model-path",
    ),
    (
        "scripts/merge_lora_weights.py",
        [*MERGE, "--model-base", "base", "--save-model-path", "base"],
        "--save-model-path base would write over --model-base base; choose another --save-model-path",
    ),
    (
        "scripts/merge_lora_weights.py",
        [*MERGE, "--save-model-path", "."],
        "--save-model-path . would write over --model-p",
    ),
    (
        "scripts/convert_checkpoint.py",
        ["--from", "base", "--to", "linked_base", "--layout", "hf", "--overwrite"],
        f"--to linked_base would write over --from base {LINKED} --to",
    ),
    (
        "scripts/quantize_checkpoint.py",
        ["--model-path", "lora", "--save-path", "base", "--bits", "4", "--overwrite"],
        "--save-path base would write over base, the base of --model-path lora; choose another --save-path",
    ),
    (
        model_vqa_loader,
        [*ASK, "q.jsonl", "--answers-file", "q.jsonl", "--overwrite"],
        "--answers-file q.jsonl would write over --question-file q.jsonl; choose another --answers-file",
    ),
    (
        model_vqa_loader,
        [*ASK, "saved", "--answers-file", "saved/data.arrow", "--overwrite"],
        "--answers-file saved/data.arrow would write over --question-file saved/data.arrow; choose another",
    ),
    (model_vqa_loader, [*ASK, "q.jsonl", "--answers-file", "hard.jsonl"], f"--question-file q.jsonl {LINKED}"),
    (model_vqa_loader, [*ASK, "q.jsonl", "--answers-file", "images/x.jpg", "--overwrite"], "images/x.jpg is an image"),
    (
        model_vqa_loader,
        [*ASK, "a.jsonl.journal", "--answers-file", "a.jsonl", "--overwrite"],
        "would write over --question-file a.jsonl.journal with its a.jsonl.journal; choose another --answers-file",
    ),
    (
        model_vqa_loader,
        [*ASK, "q.jsonl", "--answers-file", "choices.txt", "--choices", "choices.txt"],
        "--answers-file choices.txt would write over --choices choices.txt; choose another --answers-file",
    ),
    (
        vqa_score,
        ["--annotations", "T.csv", "--answers-file", "a.jsonl", "--json", "a.jsonl"],
        "over --answers-file a.jsonl",
    ),
    (vqa_score, ["--annotations", "T.csv", "--answers-file", "a.jsonl", "--json", "T.csv"], "over --annotations T.csv"),
    (
        "scripts/convert_mmvet_for_eval.py",
        ["--src", "a.jsonl", "--dst", "a.jsonl"],
        "--dst a.jsonl would write over --src a.jsonl; choose another --dst",
    ),
    (
        "scripts/convert_vizwiz_for_submission.py",
        ["--annotation-file", "q.jsonl", "--result-file", "a.jsonl", "--result-upload-file", "hard.jsonl"],
        f"--annotation-file q.jsonl {LINKED} --result-upload-file",
    ),
    (
        "scripts/convert_gqa_for_eval.py",
        ["--src", "a.jsonl", "--dst", "a.jsonl"],
        "--dst a.jsonl would write over --src a.jsonl; choose another --dst",
    ),
    (
        eval_science_qa,
        ["--base-dir", ".", "--result-file", "a.jsonl", "--output-result", "a.jsonl"],
        "--output-result a.jsonl would write over --result-file a.jsonl",
    ),
    (
        "scripts/convert_seed_for_submission.py",
        ["--annotation-file", "data.json", "--result-file", "q.jsonl", "--result-upload-file", "data.json"],
        "--result-upload-file data.json would write over --annotation-file data.json; choose another",
    ),
    (
        eval_gpt_review_bench,
        [*REVIEW, "--answer-list", "other.jsonl", "a.jsonl", "--output", "a.jsonl"],
        "--output a.jsonl would write over --answer-list a.jsonl; choose another --output",
    ),
    (
        model_vqa_mmbench,
        ["--model-path", "base", "--question-file", "T.csv", "--answers-file", "T.csv"],
        "--answers-file T.csv would write over --question-file T.csv; choose another --answers-file",
    ),
    (report, [*REPORT, "-o", "T.csv"], "--output T.csv would write over --annotations T.csv; choose another --output"),
    (report, [*REPORT, "--questions", "saved", "-o", "saved/state.json"], "over --questions saved/state.json; choose"),
    (report, [*REPORT, "-o", "other.jsonl"], "--output other.jsonl would write over --answers other.jsonl"),
    (report, [*REPORT, "-o", "images/x.jpg"], "--output images/x.jpg is an image"),
    (plan, ["--model-path", "base", "--json", "base/config.json"], "would write over config.json of --model-path base"),
    (
        "benchmarks/load_speed.py",
        ["--model-path", "base", "--output", "base/config.json"],
        "over config.json of --model-p",
    ),
    (
        "examples/shapes_world/train_base.py",
        ["--output", "images"],
        "--output images holds something else than a model",
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working directory: inputs of every program, some of them under two names."""
    texts = {
        "T.csv": "image_id,question,question_id,answer\n1,What?,1,red\n",
        "data.json": "[]",
        "other.jsonl": "{}\n",
        "q.jsonl": json.dumps({"question_id": 1, "image": "linked.jpg", "text": "What?"}) + "\n",
        "a.jsonl": json.dumps({"question_id": 1, "text": "red"}) + "\n",
        "a.jsonl.journal": "{}\n",
        "choices.txt": "yes\nno\n",
        "saved/state.json": "{}",
        "saved/data.arrow": "rows",
        "base/config.json": "{}",
        "base/model.safetensors": "weights",
        "lora/adapter_config.json": json.dumps({"base_model_name_or_path": "base"}),
        "out/config.json": json.dumps({"zero_optimization": {"stage": 2}}),
        "out/mm_projector.bin": "weights",
        "out/train_log.jsonl": "{}\n",
        "out/checkpoint-5/adapter_config.json": "{}",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "images").mkdir()
    for name in ("images/x.jpg", "elsewhere.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "images/linked.jpg").symlink_to("../elsewhere.jpg")
    (tmp_path / "linked.json").symlink_to("data.json")
    (tmp_path / "linked_base").symlink_to("base", target_is_directory=True)
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "q.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exit_code(main, words):
    try:
        return main(words)
    except SystemExit as end:  # argparse's
        return end.code


@pytest.mark.parametrize(
    ("program", "words", "message"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_output_that_is_an_input_is_refused(folder, load_program, capsys, program, words, message):
    main = (load_program(program) if isinstance(program, str) else program).main
    before = contents(folder)
    assert exit_code(main, words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "error: " in said
    assert contents(folder) == before


def test_answers_may_lie_beside_a_model_and_go_on_there(tmp_path):
    """The answers and what lies beside them are no part of the model, so the second run knows the first one's."""
    model = shutil.copytree(Path(__file__).parents[1] / "playground/llava-tiny", tmp_path / "model")
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": None, "text": "What?"}) + "\n")
    words = ["--model-path", str(model), "--question-file", str(questions), "--device", "cpu", "--max_new_tokens", "2"]
    words += ["--answers-file", str(model / "answers.jsonl")]
    assert [model_vqa_loader.main(words), model_vqa_loader.main(words)] == [0, 0]
