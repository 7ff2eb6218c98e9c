"""Cards in directories that are being written: complete from the start, and nobody's own text is lost."""

from __future__ import annotations

import shutil

import pytest

from llava.hub.card_file import write_card
from llava.hub.model_card import is_untouched

LORA = "llava-v1.5-golden-task-lora"


@pytest.fixture
def written(goldens, tmp_path):
    """A checkpoint that is complete but for its card."""
    return shutil.copytree(goldens / LORA, tmp_path / ".hidden")


def test_a_card_of_ours_is_replaced_and_anothers_kept(written, tmp_path, caplog):
    target = tmp_path / "target"
    target.mkdir()
    write_card(written, target)
    card = (written / "README.md").read_text()
    assert is_untouched(card)
    assert "# target\n" in card
    for text, is_kept in ((card, False), (card.replace("images", "Images"), True), ("# Mine\n", True), ("", True)):
        caplog.clear()
        (target / "README.md").write_text(text)
        write_card(written, target)
        assert (written / "README.md").read_text() == (text if is_kept else card)
        assert ("stays as it is" in caplog.text) is is_kept


def test_bytes_that_are_no_text_are_kept(written, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "README.md").write_bytes(b"\xff\xfe mine")
    write_card(written, target)
    assert (written / "README.md").read_bytes() == b"\xff\xfe mine"


def test_manifest_curve_and_licence_come_from_the_source(written, goldens, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (source / "loss.png").write_bytes(b"png")
    write_card(written, tmp_path / "target", source=source)
    card = (written / "README.md").read_text()
    assert "license: mit\n" in card
    assert (written / "loss.png").read_bytes() == b"png"
    assert not (written / "training.json").exists()


@pytest.mark.parametrize("program", ["merge", "convert", "quantize"])
def test_the_programs_keep_a_card_that_was_changed(goldens, load_program, tmp_path, program):
    if program == "quantize":
        pytest.importorskip("bitsandbytes")
    name = "merge_lora_weights" if program == "merge" else f"{program}_checkpoint"
    source = goldens / (LORA if program == "merge" else "llava-v1.5-golden")
    target = str(tmp_path / "target")
    words = {
        "merge": ["--model-path", str(source), "--save-model-path", target, "--no-parity", "--model-base",
                  str(goldens / "llava-v1.5-golden")],
        "convert": ["--from", str(source), "--to", target, "--layout", "hf"],
        "quantize": ["--model-path", str(source), "--save-path", target, "--bits", "4", "--device", "cpu"],
    }[program]  # fmt: skip
    main = load_program(f"scripts/{name}.py").main
    assert main(words) == 0
    card = (tmp_path / "target/README.md").read_text()
    assert is_untouched(card)
    assert ("quantised to 4 bit" in card) is (program == "quantize")
    assert ("in the layout of transformers" in card) is (program == "convert")
    (tmp_path / "target/README.md").write_text("# Mine\n")
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "target/README.md").read_text() == "# Mine\n"
