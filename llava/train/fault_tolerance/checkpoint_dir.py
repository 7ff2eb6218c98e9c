"""Checkpoint directories: atomic write, manifest of sizes and hashes, verification, rotation.

`checkpoint-N` is filled as `.checkpoint-N.writing/checkpoint-N`, synced, given its `manifest.json` (size and sha256 of
every file) and renamed. A process that dies at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava.constants import CHECKPOINT_PREFIX, STATE_FILE
from llava.files.atomic_files import atomic_write, move_directory, sync_directory, sync_tree
from llava.files.json_files import read_settings
from llava.train.output_files import LOG_FILE, STAGING_FOLDER

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_REMOVING = ".removing"
_BLOCK = 1 << 22
_HASHING_THREADS = 4


class DamagedCheckpoint(ValueError):
    """A checkpoint that no run can resume from; the message names the file and what is wrong with it."""


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return Path(output_dir) / f"{CHECKPOINT_PREFIX}{step}"


def hidden_directory(target: Path) -> Path:
    """Return the hidden directory in which a directory named as `target` is filled before `publish`."""
    return target.with_name(f".{target.name}{STAGING_FOLDER}")


def begin_writing(target: Path) -> None:
    """Make `hidden_directory`, empty."""
    hidden = hidden_directory(target)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)


def publish(target: Path) -> None:
    """Sync the files written for `target`, add their manifest and rename the directory into place.

    Raises:
        OSError: if that can't be done; `target` is as it was.
    """
    hidden = hidden_directory(target)
    written = hidden / target.name
    sync_tree(written)
    files = _describe_files(written)
    with atomic_write(written / MANIFEST_FILE) as stream:
        json.dump({"files": files}, stream, indent=1, sort_keys=True)
    sync_directory(hidden)
    move_directory(written, target)
    sync_directory(target.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def verify(checkpoint: Path) -> bool:
    """Compare a checkpoint's files with its manifest; return False if it has none, as in older versions.

    Raises:
        DamagedCheckpoint: if a file is missing or differs in size or content, or the run's progress is missing.
    """
    manifest = checkpoint / MANIFEST_FILE
    if manifest.is_file():
        files = _read_manifest(manifest)
        for name, (size, _) in files.items():
            _compare_size(checkpoint / name, size)
        _compare_contents(checkpoint, files)
    _require_progress(checkpoint)
    return manifest.is_file()


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Return the checkpoints of an output directory by step, in ascending order."""
    found = {}
    for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*"):
        step = path.name.removeprefix(CHECKPOINT_PREFIX)
        if step.isdigit() and path.is_dir():
            found[int(step)] = path
    return dict(sorted(found.items()))


def newest_valid(output_dir: str | Path) -> Path | None:
    """Return the newest intact checkpoint; damaged ones are skipped with a warning.

    Raises:
        DamagedCheckpoint: if there are checkpoints, but none is intact.
    """
    reasons = []
    for path in reversed(list_checkpoints(output_dir).values()):
        try:
            if not verify(path):
                logger.warning("%s has no %s (an older version wrote it); it can't be checked", path, MANIFEST_FILE)
        except DamagedCheckpoint as damage:
            reasons.append(str(damage))
            logger.warning("%s; skipped", damage)
        else:
            return path
    if reasons:
        raise DamagedCheckpoint(
            f"no checkpoint of {output_dir} can be resumed from: {'; '.join(reasons)}; restore one, or start over with "
            "--resume_from_checkpoint none"
        )
    return None


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove checkpoints that a killed process left half written, and rename complete ones into place."""
    for hidden in sorted(Path(output_dir).glob(f".{CHECKPOINT_PREFIX}*{STAGING_FOLDER}")):
        name = hidden.name.removeprefix(".").removesuffix(STAGING_FOLDER)
        written, target = hidden / name, hidden.with_name(name)
        if (written / MANIFEST_FILE).is_file() and not target.exists() and _is_intact(written):
            logger.info("%s was complete except for its name", target)
            move_directory(written, target)
            sync_directory(target.parent)
        shutil.rmtree(hidden, ignore_errors=True)
    for hidden in [
        *Path(output_dir).glob(f".{CHECKPOINT_PREFIX}*{_REMOVING}"),
        *Path(output_dir).glob(f".{CHECKPOINT_PREFIX}*.partial"),
    ]:
        shutil.rmtree(hidden, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, *, written: Path, best: str | None) -> None:
    """Remove checkpoints beyond `limit`: first those of later steps than the one just written, then the oldest.

    The one just written and the best one stay, whatever the limit.

    Args:
        output_dir: of the run.
        limit: number of checkpoints to keep; None or 0 for all.
        written: the one just written.
        best: path of the best one so far, None without evaluation.
    """
    if not limit or limit < 0:
        return
    kept = {written.resolve()} | ({Path(best).resolve()} if best else set())
    steps = list_checkpoints(output_dir)
    current = int(written.name.removeprefix(CHECKPOINT_PREFIX))
    order = sorted(steps, key=lambda step: (step <= current, step))
    removable = [steps[step] for step in order if steps[step].resolve() not in kept]
    for path in removable[: max(0, len(steps) - max(limit, len(kept)))]:
        hidden = path.with_name(f".{path.name}{_REMOVING}")
        path.rename(hidden)  # a half removed one must not look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)


def set_aside(output_dir: str | Path, *, after: int = -1) -> Path | None:
    """Move an earlier run's checkpoints into a folder `earlier-N` of the output directory, with a copy of its log.

    Args:
        output_dir: of the run.
        after: step at which the run starts; only checkpoints of later steps move.

    Returns:
        the folder, None if no checkpoint moved.
    """
    output_dir = Path(output_dir)
    paths = [path for step, path in list_checkpoints(output_dir).items() if step > after]
    if not paths:
        return None
    number = next(number for number in range(1, 1_000_000) if not (output_dir / f"earlier-{number}").exists())
    folder = output_dir / f"earlier-{number}"
    folder.mkdir()
    if (output_dir / LOG_FILE).is_file():
        shutil.copyfile(output_dir / LOG_FILE, folder / LOG_FILE)
    for path in paths:
        path.rename(folder / path.name)
    return folder


def _is_intact(checkpoint: Path) -> bool:
    try:
        return verify(checkpoint)
    except DamagedCheckpoint:
        return False


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST_FILE)


def _describe_files(directory: Path) -> dict[str, dict[str, int | str]]:
    paths = list(_files(directory))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = list(pool.map(_sha256, paths))
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    try:
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in read_settings(path)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error})") from error


def _compare_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing")
    if path.stat().st_size != size:
        raise DamagedCheckpoint(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")


def _compare_contents(checkpoint: Path, files: dict[str, tuple[int, str]]) -> None:
    paths = [checkpoint / name for name in files]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for path, digest, (_, expected) in zip(paths, pool.map(_sha256, paths), files.values(), strict=True):
            if digest != expected:
                raise DamagedCheckpoint(f"{path} is damaged (its sha256 is not that of {MANIFEST_FILE})")


def _require_progress(checkpoint: Path) -> None:
    state = checkpoint / STATE_FILE
    if not state.is_file():
        raise DamagedCheckpoint(f"{state} is missing")
    try:
        step = read_settings(state, is_finite=False)["global_step"]
    except (ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{state} is damaged ({error})") from error
    names = {path.name for path in checkpoint.iterdir()}
    if not any(re.match(r"optimizer|global_step\d", name) for name in names):
        raise DamagedCheckpoint(
            f"{checkpoint} has no optimizer state (--save_only_model), so step {step} can't be resumed from"
        )
