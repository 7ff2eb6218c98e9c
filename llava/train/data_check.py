"""Training data, read, checked and encoded before the weights are loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from llava.data.check_cache import cache_places, describe_inputs, load_result, store_result
from llava.data.data_files import DataFile, join_rows, locate_rows, read_files, split_paths
from llava.data.data_report import describe_examination, describe_findings
from llava.data.data_statistics import UsableRow
from llava.data.examination import Examination, examine, findings_of, rows_of_encoded
from llava.data.findings import Finding, describe_unusable
from llava.data.image_check import find_broken_images
from llava.data.records import DataError, EncodedRecord, Problem, encode_records
from llava.files import atomic_write
from llava.model.checkpoint import Checkpoint
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.validation import hold_out, warn_of_shared_images

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_rows.jsonl"
SKIPPED_VALIDATION_FILE = "skipped_validation_rows.jsonl"


def load_both(
    data_args: DataArguments,
    training_args: TrainingArguments,
    checkpoint: Checkpoint,
    patches: int,
    *,
    is_first: bool,
) -> tuple[list[EncodedRecord], list[EncodedRecord]]:
    """Return the records to train on, and those to validate on, none if that was not asked for; args as `load_data`.

    Raises:
        FileNotFoundError: if a data file is missing.
        DataError: as `load_data`.
        ValueError: if a share is asked for and all rows are about one image.
    """
    records = load_data(data_args, training_args, checkpoint, patches, is_first=is_first)
    if data_args.val_share is not None:
        return hold_out(records, data_args.val_share, data_args.val_seed)
    if data_args.eval_data_path is None:
        return records, []
    folder = data_args.eval_image_folder or data_args.image_folder
    place = dataclasses.replace(data_args, data_path=data_args.eval_data_path, image_folder=folder)
    validation = load_data(
        place, training_args, checkpoint, patches, is_first=is_first, skipped_file=SKIPPED_VALIDATION_FILE
    )
    warn_of_shared_images(records, validation)
    return records, validation


def load_data(
    data_args: DataArguments,
    training_args: TrainingArguments,
    checkpoint: Checkpoint,
    patches: int,
    *,
    is_first: bool,
    skipped_file: str = SKIPPED_FILE,
) -> list[EncodedRecord]:
    """Read, check and encode data; the first process decodes images, the others wait for what it found.

    Args:
        data_args: which data, and what happens to bad rows.
        training_args: longest row, output directory.
        checkpoint: whose template and tokenizer are used.
        patches: tokens an image becomes.
        is_first: whether this is the first of all processes, which tells and writes.
        skipped_file: in the output directory, for the rows that are left out.

    Raises:
        FileNotFoundError: if a data file is missing.
        DataError: if rows can't be used and were not asked to be left out, or none is left.
    """
    files = read_files(split_paths(data_args.data_path))
    template, length = checkpoint.config.conversation_template, training_args.model_max_length
    encoded, problems = encode_records(
        join_rows(files),
        template,
        checkpoint.tokenizer,
        image_folder=data_args.image_folder,
        patches_per_image=patches,
        max_length=length,
    )
    places = locate_rows(files)
    rows = rows_of_encoded(encoded, problems, len(places), patches)
    unusable = findings_of(problems, places)
    if not data_args.skip_data_check:
        inputs = describe_inputs(
            [file.path for file in files],
            [path for row in rows for path in row.images],
            problems,
            template=template,
            tokenizer=checkpoint.tokenizer,
            max_length=length,
            patches_per_image=patches,
        )
        with training_args.main_process_first(local=False):
            examination = _recall_or_examine(files, rows, problems, template, inputs, training_args)
        unusable = examination.unusable
    bad = {(finding.file, finding.row) for finding in unusable}
    kept = [record for row, record in zip(rows, encoded, strict=True) if places[row.index] not in bad]
    if unusable:
        message = describe_unusable([file.path for file in files], unusable, len(places))
        if not kept:
            raise DataError(f"{message}\nno row is left to train on; mend them")
        if data_args.on_bad_row == "error":
            raise DataError(f"{message}\nmend them, or pass --on_bad_row skip to leave them out")
        if is_first:
            path = Path(training_args.output_dir) / skipped_file
            _list_skipped(unusable, path)
            logger.warning("%s\nthey are left out; %s lists them all", message, path)
    return kept


def _recall_or_examine(
    files: Sequence[DataFile],
    rows: Sequence[UsableRow],
    problems: Sequence[Problem],
    template: str,
    inputs: str,
    training_args: TrainingArguments,
) -> Examination:
    places = cache_places(files[0].path, training_args.output_dir)
    known = load_result(places, inputs)
    if known is not None:
        examination, place = known
        lines = describe_findings(examination)
        logger.info("the data were checked before and have not changed since (%s)\n%s", place, "\n".join(lines))
        return examination
    broken = find_broken_images(
        (path for row in rows for path in row.images), show_progress=not training_args.disable_tqdm
    )
    examination = examine(files, rows, problems, template=template, broken_images=broken)
    store_result(places, inputs, examination)
    logger.info("%s", describe_examination(examination))
    return examination


def _list_skipped(findings: Sequence[Finding], path: Path) -> None:
    with atomic_write(path) as stream:
        stream.writelines(json.dumps(finding._asdict()) + "\n" for finding in findings)
