"""Training overwrites none of its inputs; `tests/test_inputs_are_kept.py` has all programs."""

from __future__ import annotations

import fnmatch

import pytest

from llava.train.flags.overwrites import refuse_images_overwritten
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.output_files import WRITTEN


def test_an_image_with_the_name_of_the_plot_stops_the_run(tmp_path):
    output = tmp_path / "images" / "out"
    output.mkdir(parents=True)
    image = output / "loss.png"
    image.write_bytes(b"\x89PNG")
    training = TrainingArguments(str(output), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"would write over the image .*loss.png with its loss.png; choose another"):
        refuse_images_overwritten([tmp_path / "a.png", image], training)
    refuse_images_overwritten([tmp_path / "images" / "loss.png"], training)


def test_training_writes_no_other_names(goldens, train_tiny, tmp_path):
    """What a run leaves in its output directory is in the list that inputs are compared with, but for new folders."""
    row = {"id": "1", "image": "square.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    row["conversations"].append({"from": "gpt", "value": "A square"})
    flags = ["--lora_enable", "True", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    output = tmp_path / "out"
    assert train_tiny(output, [row, row | {"id": "2", "image": "gone.png"}], *flags, "--on_bad_row", "skip") == 0
    left = [path.name for path in output.iterdir() if not any(fnmatch.fnmatch(path.name, name) for name in WRITTEN)]
    assert left == []
