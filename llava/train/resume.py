"""Where a run starts: at its newest whole checkpoint, at one that is named, or anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from llava.files import atomic_write, read_settings
from llava.train.arguments import TrainingArguments
from llava.train.checkpoints import (
    MANIFEST_FILE,
    STATE_FILE,
    DamagedCheckpoint,
    clear_leftovers,
    newest_valid,
    set_aside,
    verify,
)
from llava.train.guards import gather
from llava.train.run_record import compare_runs
from llava.train.saving import TRAINING_FILE

logger = logging.getLogger(__name__)

AUTOMATIC = ("", "auto", "true")
ANEW = ("none", "false")


def find_resume_point(training_args: TrainingArguments, record: str, log_file: str) -> str | None:
    """Return the checkpoint to continue from, None to start anew; every process must call it and gets the same.

    Leftovers of a killed process are cleared first, and lines of the log that are about to be written again removed.

    Args:
        training_args: flags.
        record: text of this run's `training.json`.
        log_file: name of the log in the output directory.

    Raises:
        FileNotFoundError: if the checkpoint asked for is not there.
        ValueError: if it is damaged, or belongs to a run with other data, another model or another order of rows.
    """
    if training_args.should_save:
        clear_leftovers(training_args.output_dir)
    gather(None)  # all wait for it
    outcome: tuple[str | None, ValueError | OSError | None] = (None, None)
    if training_args.process_index == 0:
        try:
            outcome = (_choose(training_args, record, log_file), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    chosen, error = gather(outcome)[0]
    if error is not None:
        raise error
    if chosen is not None and not Path(chosen).is_dir():
        raise FileNotFoundError(
            f"{chosen} is not on this node; put --output_dir on a file system that all nodes share, or pass "
            "--save_on_each_node True from the start"
        )
    return chosen


def _choose(training_args: TrainingArguments, record: str, log_file: str) -> str | None:
    asked = str(training_args.resume_from_checkpoint or "")
    output_dir = training_args.output_dir
    chosen, step = None, 0
    if asked.lower() in AUTOMATIC:
        chosen = newest_valid(output_dir)
    elif asked.lower() not in ANEW:
        chosen = _named(Path(asked))
    if chosen is not None:
        _compare(chosen, json.loads(record))
        logger.info("continuing from %s", chosen)
        step = read_settings(chosen / STATE_FILE)["global_step"]
    folder = set_aside(output_dir, log_file, after=step) if asked.lower() not in AUTOMATIC else None
    if folder is not None:
        logger.warning("later checkpoints of %s are not this run's; they are in %s", output_dir, folder)
    cut_log(Path(output_dir) / log_file, step)
    return chosen and str(chosen)


def _named(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint}: there is no such directory; pass auto for the newest one of "
            "--output_dir, or none to start anew"
        )
    try:
        is_checked = verify(checkpoint)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            f"--resume_from_checkpoint {checkpoint}: {error}; pass auto for the newest whole one of --output_dir, or "
            "none to start anew"
        ) from error
    if not is_checked:
        logger.warning("%s has no %s (an older version wrote it); it can't be checked", checkpoint, MANIFEST_FILE)
    return checkpoint


def _compare(checkpoint: Path, record: dict) -> None:
    path = checkpoint / TRAINING_FILE
    refused, warned = compare_runs(read_settings(path) if path.is_file() else {}, record)
    if refused:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(refused)}; pass what it was, or start anew with another "
            "--output_dir or --resume_from_checkpoint none"
        )
    for difference in warned:
        logger.warning("%s: %s", checkpoint, difference)


def cut_log(path: Path, step: int) -> None:
    """Remove the lines of later steps, which the run writes again, and those that a killed process left half."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    with atomic_write(path) as stream:
        stream.writelines(f"{line}\n" for line in kept)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
