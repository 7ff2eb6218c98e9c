"""Refuse an output directory in which training would overwrite one of its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import PLOT_FILE
from llava.data.data_files import list_files, split_paths
from llava.files.overwrite_check import find_overwrite, shared_directory
from llava.train.flags.arguments import (
    AUTOMATIC,
    DATA_FILES,
    IMAGE_FOLDERS,
    MODEL_PATHS,
    START_OVER,
    DataArguments,
    ModelArguments,
)
from llava.train.output_files import WRITTEN

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.train.flags.training_arguments import TrainingArguments


def refuse_overwrites(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuse an output directory in which the run would overwrite what it reads.

    Raises:
        ValueError: naming both flags.
    """
    output = {"--output_dir": shared_directory(training.output_dir, WRITTEN)}
    inputs = {
        **{f"--{name}": getattr(model, name) for name in MODEL_PATHS},
        "--lora_weight_path": training.lora_weight_path,
        **{
            f"--{name}": [file for path in split_paths(paths) for file in list_files(path)]
            for name in DATA_FILES
            if (paths := getattr(data, name))
        },
        **{f"--{name}": getattr(data, name) for name in IMAGE_FOLDERS},
        "--deepspeed": training.deepspeed if isinstance(training.deepspeed, str) else None,
    }
    message = find_overwrite(output, inputs)
    resumed = str(training.resume_from_checkpoint or "")
    if message is None and resumed.lower() not in (*AUTOMATIC, *START_OVER):
        # a run usually resumes from a checkpoint inside the output directory
        message = find_overwrite({"--output_dir": shared_directory(training.output_dir, ())},
                                 {"--resume_from_checkpoint": resumed})  # fmt: skip
    if message is not None:
        raise ValueError(message)


def refuse_images_overwritten(images: Iterable[Path], training: TrainingArguments) -> None:
    """Refuse an output directory in which an image of the data is called like the run's plot.

    Raises:
        ValueError: naming the image.
    """
    same_name = [path for path in images if path.name == PLOT_FILE]
    output = {"--output_dir": shared_directory(training.output_dir, (PLOT_FILE,))}
    if same_name and (message := find_overwrite(output, {"the image": same_name})):
        raise ValueError(message)
