"""Load the training and validation records: read, encode, check; all before the weights are loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.data.data_files import DataFile, extract_images, has_tables, join_rows, locate_rows, read_files, split_paths
from llava.data.doctor.check_cache import cache_places, describe_inputs, load_result, store_result
from llava.data.doctor.checks import Examination, examine, rows_of_encoded
from llava.data.doctor.images import check_images
from llava.data.doctor.report import describe_examination, describe_row_errors
from llava.data.doctor.statistics import UsableRow
from llava.data.records import DataError, EncodedRecord, encode_records, spliced_length
from llava.data.row_errors import RowError, describe_unusable, locate_errors
from llava.files.atomic_files import atomic_write
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.configuration import context_length, features_per_image
from llava.train.flags.arguments import DataArguments, is_first_process
from llava.train.flags.overwrites import refuse_images_overwritten
from llava.train.flags.requirements import refuse_dropping_all
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.output_files import SKIPPED_FILE, SKIPPED_VALIDATION_FILE
from llava.train.validation.evaluator import hold_out, warn_of_shared_images

logger = logging.getLogger(__name__)


def load_records(
    base: Checkpoint, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[list[EncodedRecord], list[EncodedRecord]]:
    """Return the records to train on and the records to validate on, none unless flags ask for them.

    Raises:
        FileNotFoundError: if a data file is missing.
        DataError: as `load_data`.
        ValueError: if a share is to be held out and all rows are about one image.
    """
    patches = features_per_image(base.config, base.config.mm_vision_config)
    records = load_data(data_args, training_args, base, patches)
    if is_first_process():
        warn_of_long_rows(records, patches, context_length(base.config))
    if data_args.val_share is not None:
        return hold_out(records, data_args.val_share, data_args.val_seed)
    if data_args.eval_data_path is None:
        return records, []
    folder = data_args.eval_image_folder or data_args.image_folder
    eval_args = dataclasses.replace(data_args, data_path=data_args.eval_data_path, image_folder=folder)
    validation = load_data(eval_args, training_args, base, patches, skipped_file=SKIPPED_VALIDATION_FILE)
    warn_of_shared_images(records, validation)
    return records, validation


def check_records(
    records: Sequence[EncodedRecord], held_out: Sequence[EncodedRecord], training_args: TrainingArguments
) -> None:
    """Refuse too few records for one batch, and an image that the run would overwrite.

    Raises:
        ValueError: naming the flag or the image.
    """
    refuse_dropping_all(len(records), training_args)
    refuse_images_overwritten((path for record in (*records, *held_out) for path in record.images), training_args)


def warn_of_long_rows(records: Sequence[EncodedRecord], patches: int, positions: int) -> None:
    """Log once how many rows are longer than the LLM's positions; `patches` is an image's number of tokens."""
    lengths = [spliced_length(record.input_ids, patches) for record in records]
    beyond = sum(length > positions for length in lengths)
    if beyond:
        logger.warning(
            "%d of %d rows are longer than the model's %d positions (max_position_embeddings, with rope_scaling's "
            "factor), the longest has %d tokens; tokens beyond are learned poorly: pass --model_max_length %d to leave "
            "such rows out, or start from weights with rope_scaling",
            *(beyond, len(lengths), positions, max(lengths), positions),
        )


def load_data(
    data_args: DataArguments,
    training_args: TrainingArguments,
    base: Checkpoint,
    patches: int,
    *,
    skipped_file: str = SKIPPED_FILE,
) -> list[EncodedRecord]:
    """Read, encode and check data files; the first process decodes the images, the others wait for its result.

    Args:
        training_args: longest row, output directory.
        base: its template and tokenizer encode the rows.
        patches: tokens of one image.
        skipped_file: lists the rows that are left out, in the output directory.

    Raises:
        FileNotFoundError: if a data file is missing.
        DataError: if rows are unusable and `--on_bad_row` is not "skip", or no row is left.
    """
    files = read_files(split_paths(data_args.data_path), data_args.table_options())
    with training_args.main_process_first(local=False):  # the others find the images there
        for note in extract_images(files, data_args.image_folder) if has_tables(files) else ():
            logger.info("%s", note)
    places = locate_rows(files)
    settings = {
        "template": base.config.conversation_template,
        "tokenizer": base.tokenizer,
        "patches_per_image": patches,
        "max_length": training_args.model_max_length,
        "use_im_start_end": base.config.mm_use_im_start_end,
    }
    encoded, errors = encode_records(join_rows(files), image_folder=data_args.image_folder, **settings)
    rows = rows_of_encoded(encoded, errors, len(places), patches)
    if data_args.skip_data_check:
        row_errors = locate_errors(errors, places)
    else:
        row_errors = _recall_or_examine(files, rows, errors, settings, data_args, training_args).unusable
    unusable = {(error.file, error.row) for error in row_errors}
    kept = [record for row, record in zip(rows, encoded, strict=True) if places[row.index][:2] not in unusable]
    if row_errors:
        message = describe_unusable([file.path for file in files], row_errors, len(places))
        if not kept:
            raise DataError(f"{message}\nno row is left to train on; fix them")
        if data_args.on_bad_row == "error":
            raise DataError(f"{message}\nfix these rows, or pass --on_bad_row skip")
        _report_skipped(row_errors, message, Path(training_args.output_dir) / skipped_file)
    return kept


def _recall_or_examine(
    files: Sequence[DataFile],
    rows: Sequence[UsableRow],
    errors: Sequence[RowError],
    settings: Mapping[str, Any],
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Examination:
    images = [path for row in rows for path in row.images]
    options = data_args.table_options() if has_tables(files) else None
    inputs = describe_inputs([file.path for file in files], images, errors, options=options, **settings)
    places = cache_places(files[0].path, training_args.output_dir)
    with training_args.main_process_first(local=False):  # the others load its result
        known = load_result(places, inputs)
        if known is not None:
            examination, place = known
            lines = describe_row_errors(examination)
            logger.info("the data were checked before and have not changed since (%s)\n%s", place, "\n".join(lines))
            return examination
        checked = check_images(images, show_progress=not training_args.disable_tqdm)
        examination = examine(files, rows, errors, template=settings["template"], images=checked)
        if checked.is_complete:
            store_result(places, inputs, examination)
        logger.info("%s", describe_examination(examination))
        return examination


def _report_skipped(row_errors: Sequence[RowError], message: str, path: Path) -> None:
    if is_first_process():
        with atomic_write(path) as stream:
            stream.writelines(json.dumps(error._asdict()) + "\n" for error in row_errors)
        logger.warning("%s\nthey are left out; %s lists them all", message, path)
