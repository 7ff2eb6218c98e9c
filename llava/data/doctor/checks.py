"""Check training data: row errors, warnings, and statistics of the usable rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import IGNORE_INDEX
from llava.conversation import get_template
from llava.data.data_files import DataFile, join_rows, locate_rows
from llava.data.doctor.images import CheckedImages
from llava.data.doctor.statistics import UsableRow, compute_statistics, summarise_traits
from llava.data.doctor.warnings import find_duplicates, find_warnings
from llava.data.records import EncodedRecord, check_records, spliced_length
from llava.data.row_errors import RowError, describe_row, locate_errors


@dataclass(frozen=True)
class Examination:
    """Result of checking data files.

    Attributes:
        files: data file -> its rows.
        errors: in the order of files and rows; a row may have several.
        statistics: see `compute_statistics`; `image_traits` has count and first paths of the images of each trait.
        has_tokens: rows were encoded, so that too long ones are known.
        has_pixels: images were decoded, so that broken ones are known.
    """

    files: dict[str, int]
    errors: list[RowError]
    statistics: dict[str, Any]
    has_tokens: bool
    has_pixels: bool

    @property
    def unusable(self) -> list[RowError]:
        """Errors of rows that can't be trained on."""
        return [error for error in self.errors if error.is_unusable]

    @property
    def warnings(self) -> list[RowError]:
        """Errors of rows that are trained on nevertheless."""
        return [error for error in self.errors if not error.is_unusable]


def check_unencoded(
    files: Sequence[DataFile], template: str, image_folder: str | Path | None
) -> tuple[list[UsableRow], list[RowError]]:
    """Check rows without a tokenizer; return the usable ones, and the errors of the others."""
    usable, errors = [], []
    for index, (images, found) in enumerate(check_records(join_rows(files), template, image_folder=image_folder)):
        if not found:
            usable.append(UsableRow(index, images))
        errors += [error.at(index) for error in found]
    return usable, errors


def rows_of_encoded(
    encoded: Sequence[EncodedRecord], errors: Sequence[RowError], total: int, patches_per_image: int
) -> list[UsableRow]:
    """Return what `encode_records` kept, each with its index among all `total` rows."""
    bad = {error.row for error in errors}
    kept = [index for index in range(total) if index not in bad]
    return [
        UsableRow(
            index,
            record.images,
            spliced_length(record.input_ids, patches_per_image),
            len(record.labels) - record.labels.count(IGNORE_INDEX),
        )
        for index, record in zip(kept, encoded, strict=True)
    ]


def examine(
    files: Sequence[DataFile],
    rows: Sequence[UsableRow],
    errors: Sequence[RowError],
    *,
    template: str,
    images: CheckedImages | None,
) -> Examination:
    """Combine errors, warnings and statistics of the rows; nothing is read from disk.

    Args:
        files: the data.
        rows: usable ones, as far as their records show.
        errors: of the others.
        template: name of the prompt template.
        images: from `check_images`; None = they were not decoded.
    """
    records, places = join_rows(files), locate_rows(files)
    broken, traits = images or CheckedImages({}, {})
    sound = [row for row in rows if not any(path in broken for path in row.images)]
    dialogue = get_template(template)

    def name_place(index: int) -> str:
        place = places[index]
        name = describe_row(place.row, place.line)
        return f"{name} of {place.file}" if len(files) > 1 else name

    found = list(errors)
    found += [broken[path].at(row.index) for row in rows for path in dict.fromkeys(row.images) if path in broken]
    found += [error.at(row.index) for row in sound for error in find_warnings(records[row.index], dialogue)]
    found += find_duplicates(((row.index, records[row.index], row.images) for row in sound), name_place)
    found.sort(key=lambda error: error.row)
    return Examination(
        files={file.path: len(file.rows) for file in files},
        errors=locate_errors(found, places),
        statistics={**compute_statistics(records, sound), "image_traits": summarise_traits(traits)},
        has_tokens=all(row.tokens is not None for row in rows),
        has_pixels=images is not None,
    )
