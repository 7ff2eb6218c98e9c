"""Files and directories are complete or not there."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llava.files.atomic_files import atomic_directory, atomic_write, remove_leftovers


def tree(directory: Path) -> dict[str, str]:
    """Relative path -> text of every file, hidden ones included."""
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_writes_text_as_utf8_with_plain_line_ends(tmp_path):
    with atomic_write(tmp_path / "deep" / "a.txt") as stream:
        stream.write("é\nb\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"\xc3\xa9\nb\n"
    assert list(tree(tmp_path)) == ["deep/a.txt"]


def test_writes_bytes(tmp_path):
    with atomic_write(tmp_path / "a.bin", "wb") as stream:
        stream.write(b"\0\r\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\0\r\n"


def test_target_is_untouched_until_the_end(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as stream:
        stream.write("new")
        stream.flush()
        assert target.read_text() == "old"
        assert all(name == "a.txt" or name.startswith(".") for name in tree(tmp_path))
    assert tree(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("failure", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_failure_keeps_the_previous_file_and_leaves_nothing_behind(tmp_path, failure):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(failure)), atomic_write(target) as stream:
        stream.write("half")
        raise failure
    assert tree(tmp_path) == {"a.txt": "old"}


def test_failing_sync_keeps_the_previous_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as stream:
        stream.write("new")
    assert tree(tmp_path) == {"a.txt": "old"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_keeps_permissions_and_follows_links(tmp_path):
    real = tmp_path / "real.txt"
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link.txt").symlink_to(real)
    with atomic_write(tmp_path / "link.txt") as stream:
        stream.write("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_refuses_other_modes_and_directories(tmp_path):
    with pytest.raises(ValueError, match=r"^mode 'a' is not supported; use 'w' for text or 'wb' for bytes$"):
        atomic_write(tmp_path / "a.txt", "a").__enter__()
    with pytest.raises(OSError, match=r"exists and is not a regular file; choose another name$"):
        atomic_write(tmp_path).__enter__()


@pytest.mark.parametrize("prepare", ["absent", "empty"])
def test_directory_appears_complete(tmp_path, prepare):
    target = tmp_path / "deep" / "model"
    if prepare == "empty":
        target.mkdir(parents=True)
    with atomic_directory(target) as directory:
        assert directory.parent == target.parent
        assert directory.name.startswith(".")
        (directory / "sub").mkdir()
        (directory / "sub" / "a.txt").write_text("a")
        assert not target.exists() or not any(target.iterdir())
    assert tree(tmp_path) == {"deep/model/sub/a.txt": "a"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


WRITE_UNTIL_KILLED = """
import sys, time
from llava.files.atomic_files import atomic_directory
with atomic_directory(sys.argv[1]) as directory:
    (directory / "half.txt").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    target = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(target)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        process.stdout.readline()
        with atomic_directory(target) as directory:  # the other one is alive: its files are left alone
            (directory / "a.txt").write_text("a")
        assert len(list(tmp_path.glob(".model.*.partial/half.txt"))) == 1
        process.kill()
    assert tree(target) == {"a.txt": "a"}
    with atomic_directory(target, replace=True) as directory:
        (directory / "b.txt").write_text("b")
    assert tree(tmp_path) == {"model/b.txt": "b"}


def test_what_is_left_of_others_stays(tmp_path):
    """Of a process that may just begin, of other directories, and of users."""
    kept = [".model.0123abcd.partial", ".model.v2.0123abcd.partial", ".model.mine.partial", ".other.0123abcd.partial"]
    for name in kept:
        (tmp_path / name).mkdir()
        if name != kept[0]:
            (tmp_path / name / "a.txt").write_text("a")
    (tmp_path / ".model.89abcdef.partial").write_text("a file")
    with atomic_directory(tmp_path / "model") as directory:
        (directory / "a.txt").write_text("a")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".model.89abcdef.partial", "model"}


def test_an_empty_directory_of_a_process_killed_long_ago_is_removed(tmp_path):
    left = tmp_path / ".model.0123abcd.partial"
    left.mkdir()
    os.utime(left, (0, 0))
    remove_leftovers(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_occupied_directory_is_refused_before_any_work(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("old")
    with (
        pytest.raises(FileExistsError, match=r"already holds files; choose another directory or empty this one$"),
        atomic_directory(tmp_path / "model"),
    ):
        pytest.fail("the body must not run")
    assert tree(tmp_path) == {"model/a.txt": "old"}


def test_where_nothing_may_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (Path("/proc/model"), tmp_path / "file" / "model"):  # the first one stops root too
        message = rf"^{target} can't be written \(.*\); choose another directory, or let yourself write there$"
        with pytest.raises(OSError, match=message), atomic_directory(target):
            pass


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "model").write_text("old")
    with pytest.raises(FileExistsError, match=r"is a file, a directory was to be written there; choose another name$"):
        atomic_directory(tmp_path / "model", replace=True).__enter__()


def test_replace_swaps_the_whole_directory(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with atomic_directory(tmp_path / "model", replace=True) as directory:
        (directory / "new.txt").write_text("new")
        assert tree(tmp_path / "model") == {"old.txt": "old"}
    assert tree(tmp_path) == {"model/new.txt": "new"}


def test_failure_leaves_the_previous_directory(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with pytest.raises(RuntimeError, match="killed"), atomic_directory(tmp_path / "model", replace=True) as directory:
        (directory / "new.txt").write_text("half")
        raise RuntimeError("killed")
    assert tree(tmp_path) == {"model/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failing_rename_puts_the_previous_directory_back(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    rename, calls = Path.rename, []

    def fail_second(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="input/output"), atomic_directory(tmp_path / "model", replace=True) as directory:
        (directory / "new.txt").write_text("new")
    assert tree(tmp_path) == {"model/old.txt": "old"}
