"""`<im_start>` and `<im_end>`: what the checkpoint says holds for the doctor, training, validation and answering."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.data.doctor import __main__ as doctor
from llava.inference.session import Session
from llava.model.checkpoint.checkpoint import open_checkpoint, open_tokenizer
from llava.model.configuration import load_config
from llava.train import recipe as program

QUESTION = "What shape is this?"
ROWS = [
    {
        "image": name,
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "a square"}],
    }
    for name in ("square.png", "landscape.jpg")
]
LORA = ["--lora_enable", "True", "--lora_r", "2", "--max_steps", "1", "--gradient_checkpointing", "False"]
VALIDATION = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_max_new_tokens", "8"]
PATCH, START, END = 704, 705, 706  # the rows after the vocabulary's, in the original's order


@pytest.fixture(scope="module")
def marked(tiny_base, tmp_path_factory):
    """A checkpoint trained with the tokens, whose tokenizer files don't list them, as LoRA runs' bases."""
    directory = tmp_path_factory.mktemp("marked") / "base"
    shutil.copytree(tiny_base, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][100:103]])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"vocab_size": 707, "mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def seen(monkeypatch):
    """The records that runs train and validate on."""
    found = []

    def load_records(*arguments, **options):
        found.extend(original(*arguments, **options))
        return found[-2], found[-1]

    original = program.load_records
    monkeypatch.setattr(program, "load_records", load_records)
    return found


def test_one_rule_for_training_doctor_validation_and_answering(
    marked, goldens, train_tiny, seen, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    data = tmp_path / "data.json"
    data.write_text(json.dumps(ROWS))
    words = ["--data_path", str(data), "--image_folder", str(goldens / "images"), "--model_max_length", "256"]
    assert doctor.main([*words, "--model_name_or_path", str(marked)]) in (0, 1)
    flags = [*LORA, *VALIDATION, "--eval_data_path", data, "--data_path", data]
    assert train_tiny(tmp_path / "out", ROWS, *flags, base=marked) == 0
    assert any("the data were checked before and have not changed" in message for message in caplog.messages)
    session = Session.load(str(marked), device="cpu", dtype="float32")
    asked = session.prompt_ids(QUESTION, 1)
    assert asked[asked.index(START) :][:3] == [START, -200, END]
    assert asked.count(START) == asked.count(END) == 1
    assert PATCH not in asked
    for records in seen:
        assert [record.input_ids[: len(asked)] for record in records] == [asked, asked]


def test_what_a_run_writes_keeps_the_tokens(marked, train_tiny, tmp_path):
    assert train_tiny(tmp_path / "out", ROWS, *LORA, base=marked) == 0
    config = load_config(tmp_path / "out")
    assert (config.mm_use_im_start_end, config.mm_use_im_patch_token, config.vocab_size) == (True, True, 707)
    written = open_checkpoint(tmp_path / "out", marked).tokenizer
    assert written.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [PATCH, START, END]
    assert written("<im_start>").input_ids == [1, START]


@pytest.mark.parametrize(
    ("base", "flag", "message"),
    [
        (
            "marked",
            "--mm_use_im_start_end False",
            "--mm_use_im_start_end False: the checkpoint has True; leave the fla",
        ),
        (
            "marked",
            "--mm_use_im_patch_token False",
            "--mm_use_im_patch_token False: the checkpoint has True; leave the",
        ),
        (
            "tiny_base",
            "--mm_use_im_start_end True",
            "--mm_use_im_start_end True: the checkpoint has False; leave the f",
        ),
        ("tiny_base", "--mm_use_im_patch_token True", "--mm_use_im_patch_token True: the checkpoint has False; leave "),
    ],
)
def test_flags_that_contradict_the_checkpoint(request, train_tiny, tmp_path, capsys, base, flag, message):
    place = request.getfixturevalue(base)
    assert train_tiny(tmp_path / "out", ROWS, *LORA, *flag.split(), base=place) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_flags_that_say_what_the_checkpoint_says(marked, train_tiny, seen, tmp_path):
    flags = ["--mm_use_im_start_end", "True", "--mm_use_im_patch_token", "True"]
    assert train_tiny(tmp_path / "out", ROWS, *LORA, *flags, base=marked) == 0
    assert START in seen[0][0].input_ids


def test_an_embedding_without_rows_for_the_tokens(tiny_base):
    config = load_config(tiny_base)
    config.mm_use_im_start_end = True
    message = (
        r"mm_use_im_start_end is true in config.json, but <im_start> and <im_end> would have ids \[704, 705\] and "
    )
    with pytest.raises(ValueError, match=message):
        open_tokenizer(tiny_base, config)
    config.mm_use_im_start_end, config.mm_use_im_patch_token = False, True  # no prompt has it, so nothing is lacking
    assert len(open_tokenizer(tiny_base, config)) == 704
    config.vocab_size = 768
    assert open_tokenizer(tiny_base, config)("<im_patch>").input_ids == [1, 704]
