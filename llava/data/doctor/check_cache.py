"""Cache of a data check's result beside the data, valid until data, images or settings change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.conversation import get_template
from llava.data.data_files import list_files
from llava.data.doctor.checks import Examination
from llava.data.doctor.report import as_json, from_json
from llava.data.records import RowError
from llava.data.table.options import TableOptions
from llava.files.atomic_files import atomic_write
from llava.files.json_files import parse_json
from llava.files.regular_files import read_text, refuse_non_file
from llava.tokenization.llama_tokenizer import LlavaTokenizer

SUFFIX = ".checked"
_START = b'{"inputs": "'
"""First bytes of a cached result."""
_FORMAT = 2
"""Raised whenever another version of the checks would find something else."""


def cache_places(data_path: str | Path, output_dir: str | Path) -> list[Path]:
    """Return the paths of a cached result: beside the first data file, or in the run's directory."""
    name = Path(data_path).name + SUFFIX
    return [Path(data_path).with_name(name), Path(output_dir) / name]


def describe_inputs(
    paths: Sequence[str],
    images: Iterable[Path],
    errors: Sequence[RowError],
    *,
    template: str,
    tokenizer: LlavaTokenizer,
    max_length: int,
    patches_per_image: int,
    use_im_start_end: bool = False,
    options: TableOptions | None = None,
) -> str:
    """Return a SHA-256 digest of everything a result depends on.

    Args:
        paths: of the data files; their time and size count, of a directory those of its files.
        images: of the usable rows; each one's time and size count.
        errors: of the rows that can't be used, among them those without their image.
        template: name of the prompt template.
        tokenizer: of the model.
        max_length: of a row, in tokens.
        patches_per_image: tokens an image becomes.
        use_im_start_end: images stand between `<im_start>` and `<im_end>`.
        options: how tables are read; None if there is no table among the files.
    """
    digest = hashlib.sha256(tokenizer.vocabulary_bytes)
    settings = [_FORMAT, repr(get_template(template)), tokenizer.legacy, max_length, patches_per_image, errors]
    settings += [use_im_start_end] if use_im_start_end else []
    settings += [repr(options)] if options is not None else []
    digest.update(json.dumps(settings).encode())
    data = [file for path in paths for file in list_files(path)]
    for path in (*data, *sorted(map(str, set(images)))):
        digest.update(f"{path}\0{_state_of(path)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_result(places: Iterable[Path], inputs: str) -> tuple[Examination, Path] | None:
    """Return the cached result for these inputs and its path; None if there is none that can be read."""
    for place in places:
        try:
            kept = parse_json(read_text(place))
            if kept["inputs"] == inputs:
                return from_json(kept), place
        except (OSError, ValueError, KeyError, TypeError):
            continue  # missing or damaged: the data are examined again
    return None


def store_result(places: Iterable[Path], inputs: str, examination: Examination) -> Path | None:
    """Cache a result at the first path that can be written and return that path; None if none can.

    A file of that name that is not a cached result is somebody's own, and stays.
    """
    for place in places:
        try:
            if place.exists() and not _is_result(place):
                continue
            with atomic_write(place) as stream:
                json.dump({"inputs": inputs, **as_json(examination)}, stream)
        except OSError:
            continue  # a folder of data may be closed to writers
        return place
    return None


def _is_result(place: Path) -> bool:
    refuse_non_file(place)
    with place.open("rb") as stream:
        return stream.read(len(_START)) == _START


def _state_of(path: str) -> tuple[int, int] | None:
    try:
        state = Path(path).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size
