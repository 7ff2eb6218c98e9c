"""Tables that hold their images: each is written once, never over another file, and nothing after a bad row."""

import hashlib
import io
import json
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from llava.data.table.bad_rows import TableError
from llava.data.table.open_grid import is_table
from llava.data.table.options import TableOptions
from llava.data.table.read import read_table, write_images


def encode(color: str, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, kind)
    return stream.getvalue()


RED, BLUE, PNG = encode("red"), encode("blue"), encode("red", "PNG")
HUB = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def hash_name(content: bytes, suffix: str) -> str:
    return hashlib.sha256(content).hexdigest()[:16] + suffix


def build(images: list[object], kind: pyarrow.DataType = HUB, **columns: object) -> pyarrow.Table:
    count = len(images)
    texts = {"question": [f"q{row}" for row in range(count)], "answer": ["a"] * count}
    return pyarrow.table({"image": pyarrow.array(images, kind), **texts, **columns})


def save(path: Path, table: pyarrow.Table) -> Path:
    pyarrow.parquet.write_table(table, path)
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_of_the_hub_are_written_once(tmp_path):
    cells = [(RED, "a.jpg"), (BLUE, None), (BLUE, None), (RED, "/home/x/b"), (PNG, "sub/c.png"), (RED, "../d.jpg")]
    images = [{"bytes": content, "path": path} for content, path in cells]
    table = read_table(save(tmp_path / "t.parquet", build(images)))
    blue = hash_name(BLUE, ".jpg")
    assert [row.image for row in table.rows] == ["a.jpg", blue, blue, "b.jpg", "sub/c.png", "d.jpg"]
    assert table.notes[-1] == "image holds 5 images"
    assert write_images(table, tmp_path / "images") == [f"wrote 5 images into {tmp_path / 'images'}"]
    assert listing(tmp_path / "images") == {
        "a.jpg": RED, blue: BLUE, "b.jpg": RED, "sub/c.png": PNG, "d.jpg": RED
    }  # fmt: skip
    note = f"wrote 0 images into {tmp_path / 'images'}, which had 5 of them"
    assert write_images(table, tmp_path / "images") == [note]


def test_plain_bytes(tmp_path):
    table = read_table(save(tmp_path / "t.parquet", build([RED, PNG], pyarrow.binary())))
    write_images(table, tmp_path / "images")
    assert listing(tmp_path / "images") == {hash_name(RED, ".jpg"): RED, hash_name(PNG, ".png"): PNG}


def test_a_column_of_images_wins_over_ids(tmp_path):
    table = read_table(save(tmp_path / "t.parquet", build([RED], pyarrow.binary(), image_id=[7])))
    assert table.rows[0].image == hash_name(RED, ".jpg")
    table = read_table(tmp_path / "t.parquet", TableOptions(image="image_id"))
    assert (table.rows[0].image, table.images) == ("COCO_val2014_000000000007.jpg", None)


def test_another_file_of_the_name_is_kept_and_nothing_is_written(tmp_path):
    images = [{"bytes": BLUE, "path": "a.jpg"}, {"bytes": RED, "path": "b.jpg"}]
    table = read_table(save(tmp_path / "t.parquet", build(images)))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/b.jpg").write_bytes(b"mine")
    with pytest.raises(TableError) as caught:
        write_images(table, tmp_path / "images")
    assert str(caught.value) == (
        f"{tmp_path / 'images'}: 1 bad row\n  row 2: image 'b.jpg' of the table is another file than the one there\n"
        "Give another image folder, or move these files away."
    )
    assert listing(tmp_path / "images") == {"b.jpg": b"mine"}


def test_bad_images(tmp_path):
    cells = [(RED, "a.jpg"), (BLUE, "a.jpg"), (b"<html>", "c.jpg"), (None, None), (None, "/x.jpg"), (b"", None)]
    images = [{"bytes": content, "path": path} for content, path in cells]
    with pytest.raises(TableError) as caught:
        read_table(save(tmp_path / "t.parquet", build([*images, None])))
    assert str(caught.value).split("\n")[1:-1] == [
        "  row 2: image 'a.jpg' has another content than on row 1",
        "  row 3: image holds a web page (HTML); the download went wrong, fetch the image itself",
        "  row 4: image is empty",
        "  row 5: image '/x.jpg' leads out of the image folder; name the file inside the folder, such as 'x.jpg'",
        "  row 6: image is empty",
        "  row 7: image is empty",
    ]


def test_paths_without_content_name_files(tmp_path):
    table = read_table(save(tmp_path / "t.parquet", build([{"bytes": None, "path": "a.jpg"}])))
    assert table.rows[0].image == "a.jpg"
    assert table.notes[-1] == "image names 1 files that the table does not hold"
    assert write_images(table, tmp_path / "images") == [f"wrote 0 images into {tmp_path / 'images'}"]


def test_a_template_has_no_effect_on_images(tmp_path):
    path = save(tmp_path / "t.parquet", build([RED], pyarrow.binary()))
    with pytest.raises(TableError, match=r"image holds images, on which --image_name has no effect"):
        read_table(path, TableOptions(image_name="{id}.jpg"))


def test_bytes_are_no_texts(tmp_path):
    path = save(tmp_path / "t.parquet", build([RED], pyarrow.binary(), blob=pyarrow.array([b"x"])))
    with pytest.raises(TableError, match=r"blob holds binary data \(binary\), not texts; name another column"):
        read_table(path, TableOptions(question="blob"))


def save_dataset(folder: Path, table: pyarrow.Table, features: dict[str, object], shards: int = 2) -> Path:
    """A directory as `Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        rows = table.slice(number * table.num_rows // shards, (number + 1) * table.num_rows // shards)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(rows.slice(0, table.num_rows // shards))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_a_dataset_saved_to_disk(tmp_path):
    answers = [[{"answer": text, "answer_id": 1} for text in ("no", "yes", "yes")]] * 4
    images = [{"bytes": RED, "path": "a.jpg"}, {"bytes": BLUE, "path": "b.jpg"}] * 2
    table = build(images, kind=HUB).drop_columns(["answer"]).append_column("answers", pyarrow.array(answers))
    folder = save_dataset(tmp_path / "d/train", table, {})
    assert is_table(folder)
    rows = read_table(folder).rows
    assert [row.question for row in rows] == ["q0", "q1", "q2", "q3"]
    assert [row.image for row in rows] == ["a.jpg", "b.jpg"] * 2
    assert [row.answers for row in rows] == [("no", "yes", "yes")] * 4
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert is_table(tmp_path / "d")
    with pytest.raises(TableError, match=r"holds 2 splits of a dataset; give the path of one: .*d/train or .*d/test$"):
        read_table(tmp_path / "d")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(TableError, match=r"cannot be read \(.*\); save it again with save_to_disk$"):
        read_table(folder)


def test_classes_are_read_by_their_names(tmp_path):
    features = {"answer": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    table = build(["1.jpg", "2.jpg"], pyarrow.string()).set_column(2, "answer", pyarrow.array([1, 0]))
    assert [row.answer for row in read_table(save_dataset(tmp_path / "d", table, features)).rows] == ["yes", "no"]
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    path = save(tmp_path / "t.parquet", table.replace_schema_metadata(noted))
    assert [row.answer for row in read_table(path).rows] == ["yes", "no"]


def test_integers_beside_missing_ones_stay_integers(tmp_path):
    frame = pandas.DataFrame({"image": ["1.jpg"] * 2, "question": ["a", "b"], "answer": [7, None]})
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(TableError, match=r"1 bad row\n  row 2: answer is empty"):
        read_table(tmp_path / "t.parquet")
    frame.fillna(8).to_parquet(tmp_path / "t.parquet")
    assert [row.answer for row in read_table(tmp_path / "t.parquet").rows] == ["7", "8"]
