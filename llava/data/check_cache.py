"""What an examination found is kept beside the data, until data, images or settings change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.conversation import get_template
from llava.data.data_report import as_json, from_json
from llava.data.examination import Examination
from llava.data.records import Problem
from llava.files import atomic_write
from llava.tokenization import LlavaTokenizer

SUFFIX = ".checked"
_FORMAT = 1
"""Raised whenever another version of the checks would find something else."""


def cache_places(data_path: str | Path, output_dir: str | Path) -> list[Path]:
    """Return where a result may lie: beside the first data file, or in the run's directory."""
    name = Path(data_path).name + SUFFIX
    return [Path(data_path).with_name(name), Path(output_dir) / name]


def describe_inputs(
    paths: Sequence[str],
    images: Iterable[Path],
    problems: Sequence[Problem],
    *,
    template: str,
    tokenizer: LlavaTokenizer,
    max_length: int,
    patches_per_image: int,
) -> str:
    """Return a digest of everything a result depends on.

    Args:
        paths: of the data files; their time and size count.
        images: of the usable rows; each one's time and size count.
        problems: of the rows that can't be used, among them those without their image.
        template: name of the prompt template.
        tokenizer: of the model.
        max_length: of a row, in tokens.
        patches_per_image: tokens an image becomes.
    """
    digest = hashlib.sha256(tokenizer.vocabulary_bytes)
    settings = [_FORMAT, repr(get_template(template)), tokenizer.legacy, max_length, patches_per_image, problems]
    digest.update(json.dumps(settings).encode())
    for path in (*paths, *sorted(map(str, set(images)))):
        digest.update(f"{path}\0{_state_of(path)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_result(places: Iterable[Path], inputs: str) -> tuple[Examination, Path] | None:
    """Return a kept result for these inputs and where it lay, None if there is none that can be read."""
    for place in places:
        try:
            kept = json.loads(place.read_text(encoding="utf-8"))
            if kept["inputs"] == inputs:
                return from_json(kept), place
        except (OSError, ValueError, KeyError, TypeError):
            continue  # missing or damaged: the data are examined again
    return None


def store_result(places: Iterable[Path], inputs: str, examination: Examination) -> Path | None:
    """Keep a result in the first place that can be written and return it, None if none can."""
    for place in places:
        try:
            with atomic_write(place) as stream:
                json.dump({"inputs": inputs, **as_json(examination)}, stream)
        except OSError:
            continue  # a folder of data may be closed to writers
        return place
    return None


def _state_of(path: str) -> tuple[int, int] | None:
    try:
        state = Path(path).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size
