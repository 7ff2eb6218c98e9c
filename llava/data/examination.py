"""One pass over training data: what is wrong with which row, and figures about the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle, get_template
from llava.data.data_files import DataFile, join_rows, locate_rows
from llava.data.data_statistics import UsableRow, compute_statistics
from llava.data.findings import Finding
from llava.data.oddities import find_duplicates, find_oddities
from llava.data.records import EncodedRecord, Problem, check_records, problem_of, spliced_length
from llava.data.supervision import Fault


@dataclass(frozen=True)
class Examination:
    """What a pass found.

    Attributes:
        files: data file -> its rows.
        findings: in the order of files and rows; a row may have several.
        statistics: see `compute_statistics`.
        has_tokens: rows were encoded, so that too long ones are known.
        has_pixels: images were decoded, so that broken ones are known.
    """

    files: dict[str, int]
    findings: list[Finding]
    statistics: dict[str, Any]
    has_tokens: bool
    has_pixels: bool

    @property
    def unusable(self) -> list[Finding]:
        """Findings of rows that can't be trained on."""
        return [finding for finding in self.findings if finding.is_unusable]

    @property
    def warnings(self) -> list[Finding]:
        """Findings of rows that are trained on all the same."""
        return [finding for finding in self.findings if not finding.is_unusable]


def check_unencoded(
    files: Sequence[DataFile], template: str, image_folder: str | Path | None
) -> tuple[list[UsableRow], list[Problem]]:
    """Check rows without a tokenizer: the usable ones, and the problems of the others."""
    usable, problems = [], []
    for index, (images, faults) in enumerate(check_records(join_rows(files), template, image_folder=image_folder)):
        if not faults:
            usable.append(UsableRow(index, images))
        problems += [problem_of(index, fault) for fault in faults]
    return usable, problems


def rows_of_encoded(
    encoded: Sequence[EncodedRecord], problems: Sequence[Problem], total: int, patches_per_image: int
) -> list[UsableRow]:
    """Return what `encode_records` kept, each with its index among all `total` rows."""
    bad = {problem.row for problem in problems}
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


def findings_of(problems: Sequence[Problem], places: Sequence[tuple[str, int]]) -> list[Finding]:
    """Return problems as findings of their files; `places` comes from `locate_rows`."""
    return [Finding(problem.code, *places[problem.row], problem.message) for problem in problems]


def examine(
    files: Sequence[DataFile],
    rows: Sequence[UsableRow],
    problems: Sequence[Problem],
    *,
    template: str,
    broken_images: Mapping[Path, Fault] | None,
) -> Examination:
    """Put together what is known about the rows; nothing is read from disk.

    Args:
        files: the data.
        rows: usable as far as their records tell.
        problems: of the others.
        template: name of the prompt template.
        broken_images: from `find_broken_images`; None = images were not decoded.
    """
    records, places = join_rows(files), locate_rows(files)
    broken = broken_images or {}
    faults = [(row.index, broken[path]) for row in rows for path in dict.fromkeys(row.images) if path in broken]
    sound = [row for row in rows if not any(path in broken for path in row.images)]
    is_plain = get_template(template).sep_style is SeparatorStyle.PLAIN

    def name_place(index: int) -> str:
        path, row = places[index]
        return f"row {row} of {path}" if len(files) > 1 else f"row {row}"

    faults += [(row.index, fault) for row in sound for fault in find_oddities(records[row.index], is_plain=is_plain)]
    faults += find_duplicates(((row.index, records[row.index], row.images) for row in sound), name_place)
    found = [*problems, *(problem_of(index, fault) for index, fault in faults)]
    found.sort(key=lambda problem: problem.row)
    return Examination(
        files={file.path: len(file.rows) for file in files},
        findings=findings_of(found, places),
        statistics=compute_statistics(records, sound),
        has_tokens=all(row.tokens is not None for row in rows),
        has_pixels=broken_images is not None,
    )
