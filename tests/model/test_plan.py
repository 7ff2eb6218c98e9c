"""The planner's command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llava.model import devices, plan
from llava.model.plan import main
from tests.model.test_memory import LLAVA_TINY

GB = 10**9


def test_the_program(capsys, tmp_path):
    words = ["--model-path", str(LLAVA_TINY), "--batch", "4", "--length", "99", "--lora-r", "8"]
    assert main([*words, "--gpu-memory", "4", "--json", str(tmp_path / "plan.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"training {LLAVA_TINY}"
    assert lines[2].startswith("  frozen weights  ")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["available"] == 4 * GB
    assert (written["setup"]["batch"], written["setup"]["rank"]) == (4, 8)
    assert sum(written["bytes"].values()) < 4 * GB
    assert main([*words, "--infer", "--gpu-memory", "0.5"]) == 1
    assert "it does not fit, nor does anything smaller" in capsys.readouterr().out


def test_without_a_model_it_is_the_7b(capsys):
    assert main(["--train", "--questions-per-image", "4.2", "--gpu-memory", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training LLaVA-1.5-7B"
    assert "batches of 16: 3," in lines[1]
    assert "4.0 questions per image" in lines[1]
    assert main(["--no-sharing", "--gpu-memory", "24"]) == 1
    assert "batches of 16: 10,240 positions; activation" in capsys.readouterr().out


def test_fp8_takes_a_byte_for_a_weight_and_nothing_to_unpack(capsys):
    assert main(["--infer", "--fp8", "--gpu-memory", "12"]) == 0
    shown = capsys.readouterr().out
    assert "  weights                                   7.6 GB\n" in shown
    assert "unpacked weights" not in shown
    for words in (["--fp8"], ["--infer", "--fp8", "--bits", "4"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "--fp8 goes with --infer and without --bits" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"image": f"{index // 4}.jpg", "conversations": turns} for index in range(64)]
    (tmp_path / "data.json").write_text(json.dumps([*rows, {"image": "no turns"}]))
    return tmp_path / "data.json"


def test_packs_of_real_records_are_counted(data, capsys):
    assert main(["--train", "--data", str(data), "--gpu-memory", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    note = "; tokens estimated from the text's length: no --model-path with a tokenizer was given"
    assert lines[0] == f"{data}: 64 rows, 4.00 questions per image{note}"
    assert lines[1] == "1 rows can't be trained on and are not counted; python -m llava.data.doctor lists them"
    assert "4.0 questions per image" in lines[3]
    assert main(["--data", str(data), "--model-path", str(LLAVA_TINY), "--gpu-memory", "24"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{data}: 64 rows, 4.00 questions per image"


def test_a_missing_data_file(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.json")]) == 2
    assert "none.json not found" in capsys.readouterr().err


def test_free_memory_is_read_from_the_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(devices, "free_memory", lambda device: 7 * GB)
    assert main(["--model-path", str(LLAVA_TINY), "--infer"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["available", "7.0", "GB"]


def test_the_weights_are_not_needed(goldens, copy_golden, change_config, tmp_path, capsys):
    directory = copy_golden("llava-v1.5-golden", tmp_path / "x")
    for path in directory.glob("pytorch_model*"):
        path.unlink()
    change_config(directory, mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert main(["--model-path", str(directory)]) == 0
    assert "needed on each GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch is 0; choose a positive number"),
        (["--gpu-memory", "inf"], "--gpu-memory is inf; choose a positive number"),
        (["--questions-per-image", "0.5"], "--questions-per-image is 0.5; choose 1 or more"),
        (["--questions-per-image", "nan"], "--questions-per-image is nan; choose 1 or more"),
        (["--lora-dropout", "1"], "--lora-dropout is 1; choose a share from 0 to below 1"),
        (["--checkpoint-layers", "some"], "--checkpoint-layers is some; choose auto, all or a number"),
        (["--data", "x", "--no-sharing"], "not allowed with argument"),
        (["--kind", "x"], "invalid choice: 'x'"),
    ],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", str(LLAVA_TINY), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_model(capsys, tmp_path):
    assert main(["--model-path", str(tmp_path / "none")]) == 2
    assert "is neither a directory nor complete in the hub's cache" in capsys.readouterr().err


def test_flags_are_parsed_before_torch_is_imported():
    code = f"import sys; sys.argv = ['plan', '--bits', '3']; import runpy\ntry: runpy.run_module({plan.__name__!r}, "
    code += "run_name='__main__')\nexcept SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
