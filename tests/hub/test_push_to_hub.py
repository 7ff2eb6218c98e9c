"""The program that publishes a model: what it uploads, what it prints, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from llava.model.checkpoint.checkpoint import open_checkpoint
from tests.hub.stand_in import TOKEN, running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client, of its own calls
REPO = "me/llava-vqa"
IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png"]
ANSWERS = ["yes", "no", "two", "three"]


@pytest.fixture(scope="session")
def program(load_program):
    return load_program("scripts/push_to_hub.py")


@pytest.fixture(scope="session")
def merged(goldens, load_program, tmp_path_factory):
    """A directory as the merge writes it."""
    target = tmp_path_factory.mktemp("merged") / "llava_merged_model"
    words = ["--model-path", str(goldens / "llava-v1.5-golden-task-lora"), "--save-model-path", str(target)]
    words += ["--model-base", str(goldens / "llava-v1.5-golden"), "--no-parity"]
    assert load_program("scripts/merge_lora_weights.py").main(words) == 0
    return target


@pytest.fixture
def model(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "llava_merged_model")


@pytest.fixture
def results(tmp_path):
    """Four questions about four images, three of them answered rightly."""
    questions = [
        {"question_id": number, "text": f"Is it <b>{number}</b>?", "image": name} for number, name in enumerate(IMAGES)
    ]
    given = [{"question_id": number, "text": text, "metadata": {}} for number, text in enumerate(ANSWERS)]
    true = [{"question_id": number, "answer": text} for number, text in enumerate([*ANSWERS[:3], "four"])]
    for name, rows in (("questions", questions), ("answers", given), ("true", true)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return ["--answers", str(tmp_path / "answers.jsonl"), "--annotations", str(tmp_path / "true.jsonl")]


def run(program, model, *words):
    return program.main(["--path", str(model), "--repo", REPO, *words])


def refuse(program, capsys, model, *words):
    assert run(program, model, *words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def test_a_merged_model_holds_its_card(merged):
    card = ModelCard.load(merged / "README.md")
    assert card.text.strip().startswith("# llava_merged_model")
    assert "with a LoRA adapter merged into it" in card.text
    assert 'llava.load("llava_merged_model")' in card.text


def test_what_is_published_loads_with_equal_weights(hub, program, merged, capsys, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in merged.iterdir()}
    assert run(program, merged) == 0
    printed = capsys.readouterr().out
    assert f"to {hub.address}/{REPO} (public, new), as me" in printed
    assert printed.endswith(f"uploaded: {hub.address}/{REPO}\n")
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 1
    assert set(repository.files) == {path.name for path in merged.iterdir()} | {".gitattributes"}
    for path in merged.iterdir():
        if path.name != "README.md":
            assert repository.files[path.name] == path.read_bytes(), path.name
    assert f'llava.load("{REPO}")'.encode() in repository.files["README.md"]
    published, local = open_checkpoint(REPO).tensors, open_checkpoint(merged).tensors
    assert sorted(published) == sorted(local)
    assert all(torch.equal(published[name], local[name]) for name in local)
    assert {path: path.stat().st_mtime_ns for path in merged.iterdir()} == before


def test_the_code_of_a_card_runs(merged, goldens, load_program, tmp_path, capsys):
    hf = tmp_path / "model_hf"
    words = ["--from", str(merged), "--to", str(hf), "--layout", "hf"]
    assert load_program("scripts/convert_checkpoint.py").main(words) == 0
    capsys.readouterr()
    blocks = re.findall(r"```python\n(.*?)```", (hf / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        block = block.replace('"model_hf"', repr(str(hf)))
        exec(block.replace('"man.jpg"', repr(str(goldens / "images/landscape.jpg"))), {})
        assert capsys.readouterr().out.strip()


def test_scores_and_images(hub, program, model, results, goldens, tmp_path, capsys):
    words = ["--gallery", "3", "--questions", str(tmp_path / "questions.jsonl")]
    assert run(program, model, *results, *words, "--image-folder", str(goldens / "images")) == 0
    assert "--gallery: 3 images with their questions and answers are shown to all who see it" in capsys.readouterr().out
    files = hub.repositories[REPO].files
    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    assert result.metric_value == 75.0
    assert "| all | 4 | 75.00 | 30.1 to 95.4 |" in card.text
    assert [name for name in files if name.startswith("images/")] == [f"images/example_{i}.jpg" for i in (1, 2, 3)]
    assert "| ![](images/example_1.jpg) | Is it &#60;b&#62;0&#60;/b&#62;? | yes | yes |" in card.text
    for number in (1, 2, 3):
        image = Image.open(io.BytesIO(files[f"images/example_{number}.jpg"]))
        assert max(image.size) <= 512
        assert not image.getexif()
    assert not any(name.encode() in files["README.md"] for name in IMAGES)


def test_no_image_without_being_asked_for(hub, program, model, results):
    assert run(program, model, *results) == 0
    assert not any(name.startswith("images/") for name in hub.repositories[REPO].files)


def test_a_dry_run_asks_nobody(hub, program, model, capsys):
    (model / ".env").write_text("SECRET=1")
    assert run(program, model, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "  model.safetensors (" in printed
    assert "left out: .env\n" in printed
    assert f'llava.load("{REPO}")' in printed
    assert hub.requests == []


def test_an_adapter_whose_base_is_named(hub, program, goldens, tmp_path, capsys):
    adapter = shutil.copytree(goldens / "llava-v1.5-golden-task-lora", tmp_path / "adapter")
    words = ["--base-model", "liuhaotian/llava-v1.5-7b"]
    assert run(program, adapter, *words) == 0
    files = hub.repositories[REPO].files
    for name in ("config.json", "adapter_config.json"):
        assert json.loads(files[name]).get("base_model_name_or_path") in (None, "liuhaotian/llava-v1.5-7b")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "liuhaotian/llava-v1.5-7b"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("liuhaotian/llava-v1.5-7b", "llama2")
    assert files["Notice"].startswith(b"Llama 2 is licensed under the LLAMA 2 Community License")
    assert f"the licence asks for a copy of itself: put it into {adapter} as LICENSE" in capsys.readouterr().out


def test_a_notice_of_ones_own_stays_and_a_base_is_an_id(hub, program, model, capsys):
    (model / "Notice").write_text("mine")
    assert run(program, model, "--base-model", "liuhaotian/llava-v1.5-7b") == 0
    assert hub.repositories[REPO].files["Notice"] == b"mine"
    message = "--base-model models/our base: give an id on the hub, OWNER/NAME"
    assert refuse(program, capsys, model, "--base-model", "models/our base") == message


def test_a_card_of_ones_own(hub, program, model, results, capsys):
    (model / "README.md").write_text("# Mine\n")
    assert "was written or changed by hand and is uploaded as it is, so --answers has no place in it; leave that" in (
        refuse(program, capsys, model, *results)
    )
    assert hub.requests == []
    assert run(program, model) == 0
    assert hub.repositories[REPO].files["README.md"] == b"# Mine\n"
    assert run(program, model, *results, "--replace-card") == 0
    assert b"# llava-vqa" in hub.repositories[REPO].files["README.md"]
    assert (model / "README.md").read_text() == "# Mine\n"


def test_a_broken_token_and_an_incomplete_model(hub, program, model, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_broken")
    assert f"{hub.address} refuses the token; run: hf auth login" in refuse(program, capsys, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    hub.requests.clear()
    assert "model.safetensors" in refuse(program, capsys, model)
    (model / "optimizer.pt").touch()
    assert "is a checkpoint that training resumes from (it holds optimizer.pt)" in refuse(program, capsys, model)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--annotations", "t.csv"], "--annotations needs --answers"),
        (["--gallery", "3"], "--gallery needs --answers and --questions and --image-folder"),
        (["--gallery", "-1"], "--gallery is -1; choose 0 or more"),
        (["--answers", "a"], "--answers needs --annotations, to be scored, or --gallery, to be shown"),
        (["--questions", "q"], "--questions and --image-folder need --answers"),
        (["--data-name", "mine"], "--data-name has no effect without --annotations"),
    ],
)
def test_flags_that_go_together(program, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        run(program, "model", *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_files_that_do_not_belong_together(program, model, results, tmp_path, capsys):
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:3]))
    assert run(program, model, "--dry-run", *results) == 1
    assert "Complete the answers: a card shows the scores of all questions." in capsys.readouterr().err


def test_the_hub_that_the_environment_names(merged):
    """As a user runs it: another process, and the client's own variables."""
    root = Path(__file__).parents[2]
    with running_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        words = ["scripts/push_to_hub.py", "--path", str(merged), "--repo", REPO, "--private"]
        done = subprocess.run(
            [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert hub.repositories[REPO].private
        assert len(hub.repositories[REPO].commits) == 1
    assert "(private, new), as me" in done.stdout
