"""Weight files are read lazily, refused when damaged, never executed, and written so that they come back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.checkpoint import read_tensors, write_tensors
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors, fingerprint, is_same_fingerprint
from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights
from llava.model.checkpoint.write_tensors import refuse_full_disk, write_weights

TENSORS = {
    "model.a": torch.arange(6.0).view(2, 3),
    "model.b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "model.c": torch.arange(4),
}
LAZY = LazyTensors.of(TENSORS)


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def sharded(tmp_path):
    """A directory of two pickled shards with an index."""
    torch.save({"model.a": TENSORS["model.a"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: TENSORS[name] for name in ("model.b", "model.c")}, tmp_path / "pytorch_model-00002-of-00002.bin")
    places = {name: f"pytorch_model-0000{1 if name == 'model.a' else 2}-of-00002.bin" for name in TENSORS}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_reads_every_layout(tmp_path, sharded):
    same(open_weights(sharded), TENSORS)
    for name, save in (("pytorch_model.bin", torch.save), ("model.safetensors", save_file)):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        save(TENSORS, directory / name)
        same(open_weights(directory), TENSORS)


def test_reads_pickles_of_old_pytorch(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same(open_weights(tmp_path), TENSORS)


def test_safetensors_go_before_pickles(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"new": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(open_weights(tmp_path)) == ["new"]


@pytest.mark.parametrize(("single", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_a_single_file_goes_before_a_stale_index(tmp_path, caplog, single, save):
    """As in transformers; the shards that the index names may be missing."""
    caplog.set_level("INFO")
    stale = tmp_path / f"{single}.index.json"
    stale.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00002.safetensors")}))
    save({"new": torch.ones(1)}, tmp_path / single)
    assert list(open_weights(tmp_path)) == ["new"]
    assert f"{stale} is not read: {single} holds all weights" in caplog.messages


def test_an_index_of_safetensors_goes_before_one_pickle(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    write_weights(LAZY, tmp_path, max_shard_bytes=1)
    assert sorted(open_weights(tmp_path)) == sorted(TENSORS)


def test_tensors_are_read_when_asked_for():
    requested = []

    def entry(name, value):
        return LazyTensor(torch.Size([1]), torch.float32, lambda: requested.append(name) or torch.tensor([value]))

    tensors = LazyTensors({"a": entry("a", 0.0), "b": entry("b", 1.0)})
    laid_over = tensors.overlaid({"b": entry("b'", 2.0), "c": entry("c", 3.0)})
    assert (len(tensors), list(tensors), sorted(laid_over), requested) == (2, ["a", "b"], ["a", "b", "c"], [])
    assert tensors.entries["a"].nbytes == 4
    assert (laid_over["b"].item(), tensors["b"].item(), requested) == (2.0, 1.0, ["b'", "b"])


def test_renamed():
    renamed = LAZY.renamed(lambda name: None if name == "model.c" else name.removeprefix("model."))
    same(renamed, {"a": TENSORS["model.a"], "b": TENSORS["model.b"]})
    with pytest.raises(ValueError, match=r"^memory holds x twice, once as model.b; fetch the file again$"):
        LAZY.renamed(lambda name: "x")


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(model.safetensors, model.safetensors.index.json,"):
        open_weights(tmp_path)


def test_missing_shard(sharded):
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    message = r"lacks pytorch_model-00002-of-00002.bin, named in pytorch_model.bin.index.json; fetch the missing files$"
    with pytest.raises(FileNotFoundError, match=message):
        open_weights(sharded)


def test_an_index_that_places_a_tensor_in_another_shard(sharded):
    path = sharded / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.b"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    message = "places model.b in pytorch_model-00001-of-00002.bin, which lacks it; fetch both files again$"
    with pytest.raises(ValueError, match=message):
        open_weights(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "3", '{"weight_map": 3}', '{"weight_map": [1]}', "\xff"])
def test_a_file_that_is_not_an_index(sharded, text):
    (sharded / "pytorch_model.bin.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin.index.json is not an index of weights \(.*fetch the file again"
    ):
        open_weights(sharded)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_safetensors(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*\); fetch it again$"):
        open_weights(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, 300, -1, -200])
@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_pickle(tmp_path, kept, is_zip):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"pytorch_model.bin (is damaged|holds more than tensors and was not loaded)"):
        open_weights(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_bytes_never_escape_as_another_error(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=is_zip)
    data = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in torch.randint(0, len(data), (3,), generator=generator).tolist():
            damaged[position] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(damaged)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in open_weights(tmp_path).values())
        except ValueError as error:
            assert str(error).startswith(str(path))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, is_zip):
    mark = tmp_path / "it-ran"
    content = {"a": torch.zeros(1), "b": Payload(mark)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"loaded \(it names posix.mkdir\); don't trust its source$"):
        open_weights(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "odd"),
    [
        ([torch.zeros(1)], ""),
        ({"b": torch.zeros(1), "a": 3}, r" \('a' is not a tensor\)"),
        (torch.zeros(1), ""),
        ({"state": {"a": torch.zeros(1)}}, r" \('state' is not a tensor\)"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, odd):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=rf"pytorch_model.bin is not a dictionary of tensors{odd}; use a file of weights$"
    ):
        open_weights(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mm_projector.bin is missing; fetch it again$"):
        open_tensor_file(tmp_path / "mm_projector.bin")


def test_written_weights_come_back(tmp_path):
    seen = []
    write_weights(LAZY, tmp_path, progress=seen.append)
    assert names(tmp_path) == ["model.safetensors"]
    same(open_weights(tmp_path), TENSORS)
    assert seen == [24, 4, 32]
    with (tmp_path / "model.safetensors").open("rb") as stream:
        assert b'{"format":"pt"}' in stream.read(400)


def test_written_in_shards(tmp_path):
    write_weights(LAZY, tmp_path, max_shard_bytes=30)
    assert names(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 60},
        "weight_map": {
            "model.a": "model-00001-of-00002.safetensors",
            "model.b": "model-00001-of-00002.safetensors",
            "model.c": "model-00002-of-00002.safetensors",
        },
    }
    same(open_weights(tmp_path), TENSORS)


@pytest.fixture
def several_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def test_several_threads_read_and_the_order_stays(tmp_path, several_threads):
    """Whatever the sizes; each of them computes on one core, and afterwards all is as before."""
    seen = []

    def entry(index):
        tensor = torch.full((index % 5 * 1000 + 1,), float(index))
        return LazyTensor(tensor.shape, tensor.dtype, lambda: seen.append(torch.get_num_threads()) or tensor)

    tensors = LazyTensors({f"t{index}": entry(index) for index in range(40)})
    write_weights(tensors, tmp_path, max_shard_bytes=30_000)
    assert (seen, torch.get_num_threads()) == ([1] * 40, 3)
    found = open_weights(tmp_path)
    assert [found[f"t{index}"].unique().item() for index in range(40)] == list(range(40))
    tensors = tensors.overlaid(LazyTensors.of({"t20": torch.tensor([torch.nan])}).entries)
    with pytest.raises(ValueError, match=r"^t20 in memory holds NaN or infinity"):
        write_weights(tensors, tmp_path)
    assert torch.get_num_threads() == 3


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    write_weights(LAZY, tmp_path, max_shard_bytes=1)
    assert len(names(tmp_path)) == 4
    same(open_weights(tmp_path), TENSORS)


def test_written_in_another_dtype(tmp_path):
    write_weights(LAZY, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "model.a": torch.float16,
        "model.b": torch.float16,
        "model.c": torch.int64,
    }


def test_views_and_gradients_are_written_too(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    write_weights(LazyTensors.of({"a": base.T, "b": torch.nn.Parameter(base[:, 1])}), tmp_path)
    same(open_weights(tmp_path), {"a": base.T.contiguous(), "b": torch.tensor([1.0, 5.0, 9.0])})


def test_fingerprint_depends_on_the_weights_alone(goldens, tmp_path):
    golden = open_weights(goldens / "llava-v1.5-golden")
    expected = fingerprint(golden)
    assert expected == fingerprint(open_weights(goldens / "llava-v1.5-golden"))
    assert [len(part) for part in expected.split("-")] == [32, 16, 16]
    for index, options in enumerate(({}, {"max_shard_bytes": 500_000})):
        directory = tmp_path / str(index)
        directory.mkdir()
        write_weights(golden, directory, **options)
        assert fingerprint(open_weights(directory)) == expected
    torch.save(dict(golden), tmp_path / "pytorch_model.bin")
    assert fingerprint(open_weights(tmp_path)) == expected
    llm = LazyTensors({name: entry for name, entry in golden.entries.items() if "vision_tower" not in name})
    assert fingerprint(llm) == expected.rpartition("-")[0]  # a vision tower of its own has a part of its own


def test_fingerprints_of_earlier_versions_are_accepted(goldens):
    """Adapters record them; those of another base are refused as before."""
    found = fingerprint(open_weights(goldens / "llava-v1.5-golden"))
    former = "c8c5fcedfd141ce865752593e200cecf"
    assert is_same_fingerprint(former, found)
    assert is_same_fingerprint(None, found)
    assert not is_same_fingerprint("0" + former[1:], found)


def test_every_tensor_of_a_base_is_in_its_fingerprint(goldens):
    golden = open_weights(goldens / "llava-v1.5-golden")
    expected = fingerprint(golden)
    for name in golden:
        changed = fingerprint(golden.overlaid(LazyTensors.of({name: golden[name] + 1}).entries))
        assert not is_same_fingerprint(expected, changed), name


def test_another_base_has_another_fingerprint(goldens):
    golden = open_weights(goldens / "llava-v1.5-golden")
    for name in ("lm_head.weight", "model.mm_projector.0.bias", "model.layers.1.mlp.up_proj.weight"):
        changed = golden.overlaid(LazyTensors.of({name: golden[name] + 0.01}).entries)
        assert fingerprint(changed) != fingerprint(golden)
    renamed, fewer = LAZY.renamed(lambda name: f"x{name}"), LazyTensors({"model.a": LAZY.entries["model.a"]})
    assert len({fingerprint(LAZY), fingerprint(renamed), fingerprint(fewer)}) == 3


def resident_bytes(path):
    """How much of a mapped file is in this process's memory."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_inside = line.endswith(str(path))
        elif is_inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
@pytest.mark.parametrize(("name", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_reading_a_large_file_holds_little_of_it(tmp_path, monkeypatch, name, save):
    monkeypatch.setattr(read_tensors, "MAX_MAPPED_BYTES", 2**20)
    save({f"t{index}": torch.full((2**18,), float(index)) for index in range(16)}, tmp_path / name)
    tensors = open_weights(tmp_path)
    kept, peak = tensors["t3"], 0
    for index in range(16):
        assert tensors[f"t{index}"].sum() == index * 2**18
        peak = max(peak, resident_bytes(tmp_path / name))
    assert 2**20 <= peak <= 4 * 2**20
    assert kept.sum() == 3 * 2**18  # pages given back come again when they are touched


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_never_written(tmp_path, value, dtype):
    bad = torch.zeros(1000, dtype=dtype)
    bad[777] = value
    message = r"^model.b in memory holds NaN or infinity; the file is damaged or the"
    with pytest.raises(ValueError, match=message):
        write_weights(LAZY.overlaid(LazyTensors.of({"model.b": bad}).entries), tmp_path)


def test_values_too_large_for_the_dtype_asked_for(tmp_path):
    large = LazyTensors.of({"a": torch.tensor([1e6])})
    message = r"^a holds values too large for torch.float16; write bfloat16 or float32 instead$"
    with pytest.raises(ValueError, match=message):
        write_weights(large, tmp_path, dtype=torch.float16)
    write_weights(large, tmp_path, dtype=torch.bfloat16)


def test_writing_over_the_file_that_is_read(tmp_path):
    write_weights(LAZY, tmp_path)
    doubled = open_weights(tmp_path).renamed(lambda name: f"{name}.again")
    write_weights(doubled, tmp_path)
    same(open_weights(tmp_path), {f"{name}.again": tensor for name, tensor in TENSORS.items()})


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "flag": torch.tensor([True])}
    write_weights(LazyTensors.of(tensors), tmp_path)
    same(open_weights(tmp_path), tensors)
    same(load_file(tmp_path / "model.safetensors"), tensors)


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def refuse(stream, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_tensors, "write_all", refuse)
    message = r"model.safetensors could not be written \(\[Errno 28\] No space left on device\); free some space"
    with pytest.raises(OSError, match=message):
        write_weights(LAZY, tmp_path)
    assert names(tmp_path) == []


def test_an_index_that_leads_out_of_its_directory(sharded):
    index = sharded / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    message = r"index.json names '../elsewhere.bin', which is not a file beside it; don't trust its source$"
    with pytest.raises(ValueError, match=message):
        open_weights(sharded)


def test_a_tensor_in_two_shards(sharded):
    torch.save({name: TENSORS[name] for name in TENSORS}, sharded / "pytorch_model-00002-of-00002.bin")
    message = r"holds model.a in two of its files; fetch it again into an empty directory$"
    with pytest.raises(ValueError, match=message):
        open_weights(sharded)


def test_a_dtype_that_is_not_supported(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds tensors of dtype F8_E4M3, which is not supported; use 16-bit weights$"
    ):
        open_weights(tmp_path)


def test_room_is_looked_for_where_a_link_leads(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large" / "disk")
    free = {tmp_path / "large": 15, tmp_path: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 0, free[place]))
    tensors = open_tensor_file(tmp_path / "a.safetensors")
    message = (
        f"^{re.escape(str(tmp_path))}/link needs 16 bytes, but {re.escape(str(tmp_path))}/large has 15 bytes; free some"
    )
    with pytest.raises(OSError, match=message):
        refuse_full_disk(tensors, None, tmp_path / "link")
    free[tmp_path / "large"] = 16
    refuse_full_disk(tensors, None, tmp_path / "link")


def test_a_file_cut_off_while_it_is_open_is_refused(tmp_path):
    """Read beyond its end, a mapped file kills the process by SIGBUS."""
    save_file({"a": torch.zeros(4), "b": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert weights["a"].tolist() == [0, 0, 0, 0]
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(8000)
    message = r"model.safetensors is damaged \(8,000 bytes instead of 400,\d+, cut off since it was opened\); fetch it "
    with pytest.raises(ValueError, match=message):
        weights["b"]


def test_a_mapped_pickle_cut_off_while_it_is_open_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4), "b": torch.zeros(100_000)}, tmp_path / "pytorch_model.bin")
    opened = open_weights(tmp_path)
    assert opened["a"].tolist() == [0, 0, 0, 0]
    with (tmp_path / "pytorch_model.bin").open("r+b") as stream:
        stream.truncate(8000)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is damaged \(8,000 bytes instead of 40\d,\d+, cut off since"
    ):
        opened["b"]


def test_a_file_cut_off_between_the_check_and_the_mapping_is_refused(tmp_path, monkeypatch):
    save_file({"b": torch.zeros(100_000)}, tmp_path / "model.safetensors")

    @contextlib.contextmanager
    def checked(path, **options):
        yield
        with path.open("r+b") as stream:
            stream.truncate(8000)

    monkeypatch.setattr("llava.model.checkpoint.read_tensors.safe_open", checked)
    with pytest.raises(ValueError, match=r"is damaged \(8,000 bytes instead of 400,"):
        open_weights(tmp_path)
