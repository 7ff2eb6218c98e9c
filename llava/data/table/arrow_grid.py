"""Read parquet and arrow tables, and directories that `datasets` saved to disk, through pyarrow."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.table.bad_rows import TableError
from llava.data.table.grid import Grid, ImageCell, Problems
from llava.files.json_files import parse_json, read_settings
from llava.files.regular_files import is_file
from llava.files.terminal_text import show

if TYPE_CHECKING:
    import pyarrow

STATE_FILE, SPLITS_FILE, FEATURES_FILE = "state.json", "dataset_dict.json", "dataset_info.json"
"""Names of `datasets`: of a saved dataset's state, of a dictionary's splits, of the types of the columns."""
_METADATA_KEY = b"huggingface"
_ROWS_AT_ONCE = 256  # of images
_Batches = Callable[[str], Iterator["pyarrow.Array"]]


def is_saved_dataset(path: Path) -> bool:
    """Return whether a directory was written by `save_to_disk` of `datasets`."""
    return any(is_file(path / name) for name in (STATE_FILE, SPLITS_FILE))


def open_arrow_grid(path: Path, name: str) -> Grid:
    """Open a .parquet or .arrow file.

    Raises:
        TableError: if pyarrow is missing, or can't read the file.
    """
    pyarrow = _import_pyarrow(name, path.suffix)
    try:
        if path.suffix.lower() == ".arrow":
            return _open_streams([path], name, {})
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(
            f"{name}: not a readable {path.suffix} table ({_first_line(error)}); export it again"
        ) from error

    def read_batches(column: str) -> Iterator[pyarrow.Array]:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
            yield batch.column(0)

    return _build_grid(file.schema_arrow, file.metadata.num_rows, read_batches, name, {})


def open_saved_dataset(directory: Path, name: str) -> Grid:
    """Open a directory that `datasets` saved to disk.

    Raises:
        TableError: if it holds several splits, pyarrow is missing, or a file can't be read.
    """
    try:
        if not (directory / STATE_FILE).is_file():
            splits = read_settings(directory / SPLITS_FILE).get("splits", [])
            ways = " or ".join(f"{name.rstrip('/')}/{split}" for split in splits)
            raise TableError(f"{name} holds {len(splits)} splits of a dataset; give the path of one: {ways}")
        state = read_settings(directory / STATE_FILE)
        info = read_settings(directory / FEATURES_FILE) if (directory / FEATURES_FILE).is_file() else {}
        paths = [directory / entry["filename"] for entry in state["_data_files"]]
    except TableError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(f"{name}: not a complete saved dataset ({error}); save it again with save_to_disk") from error
    pyarrow = _import_pyarrow(name, "datasets")
    try:
        return _open_streams(paths, name, info.get("features") or {})
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{name}: cannot be read ({_first_line(error)}); save it again with save_to_disk") from error


def _import_pyarrow(name: str, kind: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise TableError(
            f"{name}: {kind} tables need pyarrow; run: pip install \"llava[tables]\", or save the table as 'CSV UTF-8'"
        ) from error
    return pyarrow


def _open_streams(paths: Sequence[Path], name: str, features: Mapping[str, Any]) -> Grid:
    """Open arrow files, one after the other, in the stream format of `datasets` or in the file format."""
    import pyarrow

    if not paths:
        raise TableError(f"{name}: the dataset has no files and no rows; choose another one")

    def read_file(path: Path) -> tuple[pyarrow.Schema, list[pyarrow.RecordBatch]]:
        source = pyarrow.memory_map(str(path))
        try:
            reader = pyarrow.ipc.open_stream(source)
            return reader.schema, list(reader)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]

    files = [read_file(path) for path in paths]
    batches = [batch for _, found in files for batch in found]

    def read_batches(column: str) -> Iterator[pyarrow.Array]:
        for batch in batches:
            yield batch.column(batch.schema.get_field_index(column))

    return _build_grid(files[0][0], sum(batch.num_rows for batch in batches), read_batches, name, features)


def _build_grid(
    schema: pyarrow.Schema, count: int, read_batches: _Batches, name: str, features: Mapping[str, Any]
) -> Grid:
    import pyarrow

    features = features or _read_features(schema)
    header = schema.names

    def read_cells(column: str) -> Iterator[Any]:
        try:
            for array in read_batches(column):
                yield from array.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise TableError(f"{name}: {column} cannot be read ({_first_line(error)}); export it again") from error

    def read_column(number: int, problems: Problems) -> list[str]:
        column, kind = header[number], schema.field(number).type
        labels = _read_labels(features.get(column))
        if _holds_bytes(kind):
            raise TableError(f"{name}: {column} holds binary data ({kind}), not texts; name another column")
        cells = list(read_cells(column))
        if labels is not None:
            cells = [labels[cell] if isinstance(cell, int) and 0 <= cell < len(labels) else None for cell in cells]
        return list(map(_as_text, cells))

    def read_images(column: str) -> Callable[[], Iterator[ImageCell]]:
        return lambda: map(_as_image, read_cells(column))

    images = {number: read_images(field.name) for number, field in enumerate(schema) if _holds_images(field.type)}
    return Grid(header, range(1, count + 1), "row", read_column, [], image_columns=images)


def _read_features(schema: pyarrow.Schema) -> Mapping[str, Any]:
    """Return the types of the columns that `datasets` notes in a file's metadata."""
    noted = (schema.metadata or {}).get(_METADATA_KEY)
    try:
        features = parse_json(noted)["info"]["features"] if noted else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _read_labels(feature: Any) -> list[str] | None:
    """Return the names of a column of classes, whose cells are their numbers."""
    is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return feature["names"] if is_class and isinstance(feature.get("names"), list) else None


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow

    types = pyarrow.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _holds_images(kind: pyarrow.DataType) -> bool:
    """Return whether a column holds files: bytes, or the hub's bytes with a path."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return _holds_bytes(kind)


def _as_image(cell: bytes | Mapping[str, Any] | None) -> ImageCell:
    if cell is None or isinstance(cell, bytes):
        return ImageCell(cell or None, "")
    return ImageCell(cell["bytes"] or None, cell.get("path") or "")


def _as_text(cell: Any) -> str:
    """Return the text of a value: "" of null, 7 of 7.0 (so pandas writes integers beside nulls), JSON of lists."""
    if isinstance(cell, str):
        return cell
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else repr(cell)
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(" ").removesuffix(" 00:00:00")
    if isinstance(cell, (list, dict)):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell)


def _first_line(error: Exception) -> str:
    return show(str(error).split("\n")[0])
