"""A checkpoint is complete or absent at every moment; damage is found, named and skipped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys

import pytest

from llava.train.fault_tolerance.checkpoint_dir import (
    DamagedCheckpoint,
    begin_writing,
    clear_leftovers,
    hidden_directory,
    list_checkpoints,
    newest_valid,
    publish,
    rotate,
    set_aside,
    verify,
)

CONTENT = {"optimizer.pt": b"moments", "global/rank_0.pt": b"shard", "weights.bin": b"0123456789"}
moments = []
"""What is called at each access to files, while it holds anything: audit hooks can't be removed."""


def call(event, arguments):
    if moments and (event == "open" or event.split(".")[0] in ("os", "shutil")):
        moments[-1](event)


@pytest.fixture(scope="module")
def hook():
    sys.addaudithook(call)


@pytest.fixture
def at_each_access(hook, monkeypatch):
    """Return the function (action) -> context in which the action is called before each access to files."""
    sync = os.fsync

    def fsync(descriptor):
        call("os.fsync", ())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("llava.train.fault_tolerance.checkpoint_dir._HASHING_THREADS", 1)  # one moment after the other
    yield moments.append
    moments.clear()


def fill(target, step, content=CONTENT):
    directory = hidden_directory(target) / target.name
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def write(output, step, content=CONTENT):
    target = output / f"checkpoint-{step}"
    begin_writing(target)
    fill(target, step, content)
    publish(target)
    return target


def test_files_and_manifest(tmp_path):
    target = write(tmp_path, 3)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()) == [
        "global/rank_0.pt", "manifest.json", "optimizer.pt", "trainer_state.json", "weights.bin",
    ]  # fmt: skip
    files = json.loads((target / "manifest.json").read_text())["files"]
    assert files["weights.bin"] == {
        "bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }
    assert sorted(files) == ["global/rank_0.pt", "optimizer.pt", "trainer_state.json", "weights.bin"]
    assert verify(target) is True
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("earlier", [[], [2]], ids=["new", "replacing"])
def test_at_every_moment_a_kill_leaves_an_intact_checkpoint(tmp_path, at_each_access, earlier):
    output = tmp_path / "out"
    for step in [1, *earlier]:
        write(output, step, {**CONTENT, "weights.bin": b"former"})
    found = []

    def look(event):
        action = moments.pop()  # its own accesses to files don't count
        shutil.copytree(output, tmp_path / "copy")
        clear_leftovers(tmp_path / "copy")
        newest = newest_valid(tmp_path / "copy")
        found.append((newest.name, (newest / "weights.bin").read_bytes()))
        assert [path.name for path in (tmp_path / "copy").iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(tmp_path / "copy")
        moments.append(action)

    at_each_access(look)
    target = write(output, 2)
    rotate(output, 1, written=target, best=None)
    look("the end")
    moments.clear()
    former = ("checkpoint-2" if earlier else "checkpoint-1", b"former")
    assert found[0] == former
    assert found[-1] == ("checkpoint-2", CONTENT["weights.bin"])
    assert len(found) > 40
    changes = [pair for pair in itertools.pairwise(found) if pair[0] != pair[1]]
    assert changes == [(former, ("checkpoint-2", CONTENT["weights.bin"]))]
    assert list(list_checkpoints(output)) == [2]


def test_a_full_disk_at_every_moment_leaves_the_checkpoint_before(tmp_path, at_each_access):
    write(tmp_path, 1)
    failed = 0
    for number in range(1, 1000):
        seen = []

        def fail(event, number=number, seen=seen):
            seen.append(event)
            if len(seen) == number:
                raise OSError(errno.ENOSPC, "No space left on device")

        at_each_access(fail)
        try:
            write(tmp_path, 2)
            moments.clear()
        except OSError as error:
            moments.clear()
            assert error.errno == errno.ENOSPC
            failed += 1
        assert verify(tmp_path / "checkpoint-1")
        clear_leftovers(tmp_path)
        newest = newest_valid(tmp_path)
        if newest.name == "checkpoint-2":
            shutil.rmtree(newest)
        if len(seen) < number:
            break
    assert failed > 20
    assert len(seen) < number, "every access has failed once"


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*CONTENT, "trainer_state.json"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(remove, "is missing"), (cut, r"has [\d,]+ bytes instead of [\d,]+"), (flip_bit, "is damaged .its sha256 is not")],
)
def test_damage_is_named_and_skipped(tmp_path, caplog, name, damage, reason):
    for step in (1, 10, 9):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-10" / name)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint-10/{name} {reason}"):
        verify(tmp_path / "checkpoint-10")
    assert newest_valid(tmp_path) == tmp_path / "checkpoint-9"
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / 'checkpoint-10' / name} ")
    assert warning.endswith("; skipped")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": [1]}', '{"files": {"weights.bin": {"bytes": 10}}}'])
def test_a_damaged_manifest(tmp_path, text):
    target = write(tmp_path, 1)
    (target / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint-1/manifest.json is damaged \("):
        verify(target)


def test_one_without_manifest_is_taken_with_a_warning(tmp_path, caplog):
    target = write(tmp_path, 1)
    (target / "manifest.json").unlink()
    assert verify(target) is False
    assert newest_valid(tmp_path) == target
    assert caplog.messages == [
        f"{target} has no manifest.json (an older version wrote it); it can't be checked",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "trainer_state.json").unlink(), r"trainer_state.json is missing"),
        (
            lambda path: (path / "trainer_state.json").write_text("{"),
            r"trainer_state.json is damaged \(.*not valid JSON",
        ),
        (
            lambda path: (path / "trainer_state.json").write_text("{}"),
            r"trainer_state.json is damaged \('global_step'\)",
        ),
        (
            lambda path: (path / "optimizer.pt").unlink(),
            r"checkpoint-1 has no optimizer state \(--save_only_model\), so step 1 can't be resumed from",
        ),
    ],
)
def test_without_manifest_the_progress_is_needed(tmp_path, damage, message):
    target = write(tmp_path, 1)
    (target / "manifest.json").unlink()
    damage(target)
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(target)


@pytest.mark.parametrize("name", ["global_step7", "optimizer_0"])
def test_states_of_deepspeed_and_fsdp_count_as_optimizers(tmp_path, name):
    assert verify(write(tmp_path, 7, {f"{name}/shard": b"x"}))


def test_no_intact_checkpoint(tmp_path):
    assert newest_valid(tmp_path) is None
    for step in (1, 2):
        (write(tmp_path, step) / "weights.bin").unlink()
    message = (
        r"no checkpoint of .* can be resumed from: .*checkpoint-2/weights.bin is missing; "
        r".*checkpoint-1/weights.bin is missing; restore one, or start over with --resume_from_checkpoint none$"
    )
    with pytest.raises(DamagedCheckpoint, match=message):
        newest_valid(tmp_path)


def test_other_names_are_not_checkpoints(tmp_path):
    for name in ("checkpoint-x", "checkpoint-", "other-3", ".checkpoint-4.writing"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    for step in (11, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert list_checkpoints(tmp_path) == {step: tmp_path / f"checkpoint-{step}" for step in (9, 11)}


def test_leftovers_are_cleared_or_finished(tmp_path):
    write(tmp_path, 1)
    begin_writing(tmp_path / "checkpoint-2")
    fill(tmp_path / "checkpoint-2", 2)
    write(tmp_path, 3)
    (tmp_path / ".checkpoint-3.writing").mkdir()
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.writing" / "checkpoint-3")
    (tmp_path / ".checkpoint-0.removing").mkdir()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert verify(tmp_path / "checkpoint-3")


def test_a_finished_leftover_that_is_damaged_goes(tmp_path):
    (write(tmp_path, 3) / "weights.bin").unlink()
    (tmp_path / ".checkpoint-3.writing").mkdir()
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.writing" / "checkpoint-3")
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 9]),
        (0, None, [1, 2, 3, 9]),
        (4, None, [1, 2, 3, 9]),
        (3, None, [1, 2, 3]),  # the later one is not part of this run: it was skipped
        (2, None, [2, 3]),
        (1, None, [3]),
        (2, 1, [1, 3]),
        (1, 1, [1, 3]),
        (1, 3, [3]),
    ],
)
def test_rotation(tmp_path, limit, best, kept):
    for step in (1, 2, 9, 3):
        write(tmp_path, step)
    rotate(
        tmp_path,
        limit,
        written=tmp_path / "checkpoint-3",
        best=None if best is None else f"{tmp_path}/checkpoint-{best}",
    )
    assert list(list_checkpoints(tmp_path)) == kept


def test_an_earlier_run_is_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        write(tmp_path, 1)
        (tmp_path / "train_log.jsonl").write_text("x")
        assert set_aside(tmp_path) == tmp_path / f"earlier-{number}"
        assert sorted(path.name for path in (tmp_path / f"earlier-{number}").iterdir()) == [
            "checkpoint-1",
            "train_log.jsonl",
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "train_log.jsonl"]
    (tmp_path / "train_log.jsonl").unlink()
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert set_aside(tmp_path, after=2) == tmp_path / "earlier-3"
    assert list(list_checkpoints(tmp_path)) == [1, 2]
    assert [path.name for path in (tmp_path / "earlier-3").iterdir()] == ["checkpoint-3"]
