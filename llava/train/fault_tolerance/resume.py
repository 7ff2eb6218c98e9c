"""Choose where a run starts: at its newest intact checkpoint, at a named one, or at the beginning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llava.constants import STATE_FILE, TRAINING_FILE
from llava.files.atomic_files import atomic_write
from llava.files.json_files import parse_json, read_settings
from llava.train.distributed import gather_objects
from llava.train.fault_tolerance.checkpoint_dir import (
    MANIFEST_FILE,
    DamagedCheckpoint,
    clear_leftovers,
    list_checkpoints,
    newest_valid,
    set_aside,
    verify,
)
from llava.train.fault_tolerance.checkpoint_pickles import refuse_code
from llava.train.fault_tolerance.run_manifest import compare_runs
from llava.train.flags.arguments import AUTOMATIC, START_OVER
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.output_files import LOG_FILE

logger = logging.getLogger(__name__)


def find_resume_point(training_args: TrainingArguments, manifest: str) -> str | None:
    """Return the checkpoint to resume from, None to start over; every rank must call it and gets the same.

    Leftovers of a killed process are cleared first, and log lines of steps that will run again are removed.

    Args:
        training_args: flags.
        manifest: text of this run's `training.json`.

    Raises:
        FileNotFoundError: if the checkpoint asked for is not there.
        ValueError: if it is damaged, holds code, or belongs to a run with other data, another model or another order of
            rows.
    """
    if training_args.should_save:
        clear_leftovers(training_args.output_dir)
    gather_objects(None)  # all ranks wait for it
    outcome: tuple[str | None, ValueError | OSError | None] = (None, None)
    if training_args.process_index == 0:
        try:
            outcome = (_choose(training_args, manifest), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    chosen, error = gather_objects(outcome)[0]
    if error is not None:
        raise error
    if chosen is not None and not Path(chosen).is_dir():
        raise FileNotFoundError(
            f"{chosen} is not on this node; put --output_dir on a file system that all nodes share, or pass "
            "--save_on_each_node True from the start"
        )
    return chosen


def former_settings(training_args: TrainingArguments) -> dict[str, Any]:
    """Return the `training.json` of the checkpoint that this run will resume from, without verifying it.

    Empty if the run starts over, or the file is missing or damaged.
    """
    asked = str(training_args.resume_from_checkpoint or "")
    if asked.lower() in START_OVER:
        return {}
    checkpoints = list_checkpoints(training_args.output_dir)
    if asked.lower() in AUTOMATIC and not checkpoints:
        return {}
    path = (checkpoints[max(checkpoints)] if asked.lower() in AUTOMATIC else Path(asked)) / TRAINING_FILE
    try:
        return read_settings(path, is_finite=False) if path.is_file() else {}
    except ValueError:
        return {}


def _choose(training_args: TrainingArguments, manifest: str) -> str | None:
    asked = str(training_args.resume_from_checkpoint or "")
    output_dir = training_args.output_dir
    chosen, step = None, 0
    if asked.lower() in AUTOMATIC:
        chosen = newest_valid(output_dir)
    elif asked.lower() not in START_OVER:
        chosen = _verify_named(Path(asked))
    if chosen is not None:
        _compare(chosen, parse_json(manifest))
        _refuse_code(chosen)
        logger.info("resuming from %s", chosen)
        step = read_settings(chosen / STATE_FILE, is_finite=False)["global_step"]
    folder = set_aside(output_dir, after=step) if asked.lower() not in AUTOMATIC else None
    if folder is not None:
        logger.warning("later checkpoints of %s belong to another run; they were moved to %s", output_dir, folder)
    cut_log(Path(output_dir) / LOG_FILE, step)
    return chosen and str(chosen)


def _verify_named(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint}: there is no such directory; pass auto for the newest one of "
            "--output_dir, or none to start over"
        )
    try:
        is_checked = verify(checkpoint)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            f"--resume_from_checkpoint {checkpoint}: {error}; pass auto for the newest intact one of --output_dir, "
            "or none to start over"
        ) from error
    if not is_checked:
        logger.warning("%s has no %s (an older version wrote it); it can't be checked", checkpoint, MANIFEST_FILE)
    return checkpoint


def _compare(checkpoint: Path, manifest: dict) -> None:
    path = checkpoint / TRAINING_FILE
    refused, warned = compare_runs(read_settings(path, is_finite=False) if path.is_file() else {}, manifest)
    if refused:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(refused)}; pass what it was, or start over with another "
            "--output_dir or --resume_from_checkpoint none"
        )
    for difference in warned:
        logger.warning("%s: %s", checkpoint, difference)


def _refuse_code(checkpoint: Path) -> None:
    try:
        refuse_code(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"{error}; pass another checkpoint with --resume_from_checkpoint, or none to start over"
        ) from None


def cut_log(path: Path, step: int) -> None:
    """Remove log lines of later steps, which run again, and lines that a killed process left half written."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    with atomic_write(path) as stream:
        stream.writelines(f"{line}\n" for line in kept)


def _step_of(line: str) -> float:
    try:
        return parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
