"""`model_vqa_loader` answers every line in order, goes on after any interruption, and says what it could not do."""

import csv
import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llava.data.table.bad_rows import TableError
from llava.eval import answer_program, model_vqa_loader
from llava.eval.model_vqa_loader import main
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.engine.image_loader import ImageLoader
from llava.inference.engine.limits import Limits

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [
    {"question_id": 7, "image": "landscape.jpg", "text": "Is there railing?", "kind": "kept out"},
    {"question_id": "b", "text": "hello"},
    {"question_id": 3, "image": ["portrait.png", "square.png"], "text": "Compare"},
    {"question_id": 2, "image": "tiny.png", "text": "What are the  colors of the bikes?"},
    {"question_id": 9, "image": "square.png", "text": "<image> where?"},
]

BAD_IMAGES = {
    "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "b.jpg": b"<html>404</html>",
    "c.png": b"\x89PNG\r\n\x1a\n",
    "gone.jpg": None,
}


def write_questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Program:
    """The program on the goldens' model, with files of one test."""

    def __init__(self, goldens, folder):
        self.questions = write_questions(folder / "questions.jsonl", ROWS)
        self.answers = folder / "out" / "answers.jsonl"
        self.flags = {
            "--model-path": goldens / "llava-v1.5-golden",
            "--image-folder": goldens / "images",
            "--question-file": self.questions,
            "--answers-file": self.answers,
            "--max_new_tokens": 5,
            "--batch-size": 2,
            "--device": "cpu",
        }

    def arguments(self, *more, **changed):
        flags = {**self.flags, **{f"--{name.replace('_', '-')}": value for name, value in changed.items()}}
        return [*(str(part) for flag in flags.items() for part in flag), *map(str, more)]

    def __call__(self, *more, **changed):
        return main(self.arguments(*more, **changed))

    @property
    def journal(self):
        return self.answers.with_name(f"{self.answers.name}.journal")

    def records(self):
        return [json.loads(line) for line in self.answers.read_text().splitlines()]


@pytest.fixture
def program(goldens, tmp_path):
    torch.set_num_threads(1)
    return Program(goldens, tmp_path)


def test_one_answer_per_line_in_order(program, capsys):
    assert program() == 0
    records = program.records()
    assert [record["question_id"] for record in records] == [row["question_id"] for row in ROWS]
    assert [record["prompt"] for record in records] == [row["text"] for row in ROWS]
    assert {tuple(record) for record in records} == {
        ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
    }
    assert {record["model_id"] for record in records} == {"llava-v1.5-golden"}
    assert all(record["text"] and record["metadata"] == {} for record in records)
    assert capsys.readouterr().out == f"wrote {program.answers}: 5 of 5 questions answered\n"


TABLE = [
    ("image", "вопрос", "другой"),
    ("square.png", "Что это?", "Кто это?"),
    ("tiny.png", "Где это?", "Где он?"),
    ("square.png", "Что это?", "Что там?"),
]


def test_a_table_is_answered_as_its_lines_and_resumed_only_as_it_was(program, tmp_path, capsys):
    table = tmp_path / "t.csv"
    with table.open("w", encoding="cp1251", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows(TABLE)
    write_questions(
        program.questions,
        [{"question_id": key, "image": image, "text": text} for key, (image, text, _) in enumerate(TABLE[1:])],
    )
    assert program() == 0
    from_lines = program.answers.read_bytes()
    columns = ["--encoding", "cp1251", "--question_column", "вопрос"]
    capsys.readouterr()
    assert program(*columns, question_file=table) == 0  # nothing is left to do
    assert "3 of 3 answers exist already" in capsys.readouterr().err
    assert program(*columns, "--overwrite", question_file=table) == 0
    assert program.answers.read_bytes() == from_lines
    capsys.readouterr()
    assert program(*columns[:3], "другой", question_file=table) == 2
    assert f"{program.answers} belongs to another run (questions was '" in capsys.readouterr().err
    assert program.answers.read_bytes() == from_lines


def test_images_inside_a_table_are_written_into_the_image_folder(program, goldens, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["square.png", "tiny.png", "square.png"]
    images = [{"bytes": (goldens / "images" / name).read_bytes(), "path": name} for name in names]
    table = pyarrow.table({"image": images, "question": ["What?", "Where?", "Who?"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert program(question_file=tmp_path / "t.parquet", image_folder=tmp_path / "new") == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["square.png", "tiny.png"]
    answers = program.answers.read_bytes()
    rows = zip(names, table["question"].to_pylist(), strict=True)
    write_questions(
        program.questions,
        [{"question_id": key, "image": image, "text": text} for key, (image, text) in enumerate(rows)],
    )
    assert program("--overwrite") == 0
    assert program.answers.read_bytes() == answers
    assert program("--overwrite", question_file=tmp_path / "t.parquet", image_folder="") == 2
    assert "t.parquet holds images; pass --image-folder with the folder into which" in capsys.readouterr().err


def test_a_batch_of_any_size_gives_the_same_file(program):
    program()
    whole = program.answers.read_bytes()
    for size in (1, 4, 100):
        program("--overwrite", batch_size=size)
        assert program.answers.read_bytes() == whole


@pytest.mark.parametrize("kept", range(5))
def test_interrupted_and_continued_is_uninterrupted(program, monkeypatch, capsys, kept):
    program()
    whole = program.answers.read_bytes()
    write = AnswersFile.write

    def interrupted(self, answer, model_id):
        if self.done == kept:
            raise KeyboardInterrupt
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "write", interrupted)
    assert program("--overwrite") == 130
    monkeypatch.undo()
    message = f"stopped: {program.journal} holds {kept} of 5 answers; run the same command without --overwrite"
    assert message in capsys.readouterr().err
    with program.journal.open("ab") as stream:
        stream.write(whole[:20])
    assert program() == 0
    assert program.answers.read_bytes() == whole


def test_nothing_to_do_reads_no_weights(program, monkeypatch, capsys):
    program()
    monkeypatch.setattr(answer_program, "load_session", None)
    assert program() == 0
    assert "5 of 5 answers exist already" in capsys.readouterr().err


def test_it_says_at_once_what_it_does(program, monkeypatch, capsys):
    def reading(path, options, **_):
        assert capsys.readouterr().err == f"reading questions from {program.questions}\n"
        raise TableError("enough")

    monkeypatch.setattr(model_vqa_loader, "read_question_file", reading)
    assert program() == 2


def test_a_full_disk_keeps_what_was_written(program, monkeypatch, capsys):
    program()
    whole = program.answers.read_bytes()
    write = AnswersFile.write

    def full(self, answer, model_id):
        if self.done == 3:
            raise OSError(28, "No space left on device")
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "write", full)
    capsys.readouterr()
    assert program("--overwrite") == 2
    monkeypatch.undo()
    message = (
        f"error: {program.answers} can't be written (No space left on device); its 3 answers are intact: "
        "free disk space, then run the same command without --overwrite to resume"
    )
    assert message in capsys.readouterr().err
    assert program() == 0
    assert program.answers.read_bytes() == whole


def test_too_large_a_batch_says_so(program, monkeypatch, capsys):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(AnswersFile, "write", too_large)
    assert program() == 2
    message = "out of memory (CUDA out of memory); pass a smaller --batch-size; run the same command again to resume"
    assert message in capsys.readouterr().err


def test_bad_rows_become_records_and_the_exit_code_says_so(program, capsys):
    program()
    good = {record["question_id"]: record["text"] for record in program.records()}
    bad = [
        {"question_id": 100, "image": "none.jpg", "text": "gone"},
        {"question_id": 101, "image": "none2.jpg", "text": "gone too"},
        {"question_id": 102, "image": "../images/tiny.png", "text": "outside"},
        {"question_id": 103, "image": "tiny.png", "text": ""},
        {"question_id": 104, "text": "long " * 600},
    ]
    write_questions(program.questions, [row for pair in zip(bad, ROWS, strict=True) for row in pair])
    capsys.readouterr()
    assert program("--overwrite") == 1
    records = program.records()
    assert {record["question_id"]: record["text"] for record in records if "error" not in record} == good
    codes = {record["question_id"]: record["error"] for record in records if "error" in record}
    assert codes == {
        100: "image_missing",
        101: "image_missing",
        102: "path_outside_folder",
        103: "question_empty",
        104: "prompt_too_long",
    }
    assert records[0]["text"] == ""
    assert records[0]["metadata"]["error"] == "image_missing"
    assert "none.jpg not found" in records[0]["metadata"]["message"]
    counts = "(image_missing 2, path_outside_folder 1, prompt_too_long 1, question_empty 1)"
    assert f"error: 5 questions have no answer {counts}" in capsys.readouterr().err
    assert program() == 1  # all done before, the errors still count


def test_how_images_are_read_is_a_part_of_the_run(program, monkeypatch, capsys):
    program()
    run_path = program.answers.with_name("answers.jsonl.run.json")
    run = json.loads(run_path.read_text())
    assert run["image_rules"]["exif_orientation"] == "applied"
    del run["image_rules"]  # answers of a version that left the orientation out
    run_path.write_text(json.dumps(run))
    assert program() == 2
    assert "belongs to another run (image_rules was None, is {" in capsys.readouterr().err


def test_what_earlier_versions_recorded_of_a_model_goes_on(program, capsys):
    """They knew fewer values of the weights, and nothing of a base or a vision tower that no flag names."""
    program()
    run_path = program.answers.with_name("answers.jsonl.run.json")
    run = json.loads(run_path.read_text())
    former = {**run, "model": run["model"].split("-")[0], "model_base": None, "vision_tower": None}
    run_path.write_text(json.dumps(former))
    assert program() == 0
    run_path.write_text(json.dumps({**former, "model": "0" * 32}))
    assert program() == 2
    assert f"belongs to another run (model was '{'0' * 32}', is '{run['model']}')" in capsys.readouterr().err


@pytest.mark.parametrize("image_folder", ["", "/", "the images'"])
def test_absolute_image_names(program, goldens, image_folder):
    program()
    texts = [record["text"] for record in program.records()]
    rows = []
    for row in ROWS:
        names = row.get("image", [])
        names = [str(goldens / "images" / name) for name in ([names] if isinstance(names, str) else names)]
        rows.append({**row, "image": names})
    write_questions(program.questions, rows)
    folder = goldens / "images" if image_folder == "the images'" else image_folder
    assert program("--overwrite", image_folder=folder) == 0
    assert [record["text"] for record in program.records()] == texts


def test_two_runs_record_the_same_errors(program, goldens):
    rows = [{"question_id": number, "image": name, "text": "What?"} for number, name in enumerate(BAD_IMAGES)]
    write_questions(program.questions, rows)
    folder = program.questions.parent / "images"
    folder.mkdir()
    for name, content in BAD_IMAGES.items():
        if content is not None:
            (folder / name).write_bytes(content)
    records = []
    for workers in (0, 1):
        assert program("--overwrite", "--workers", workers, image_folder=folder) == 1
        records.append(program.answers.read_bytes())
    assert records[0] == records[1]
    codes = [record["error"] for record in program.records()]
    assert codes == ["image_corrupt", "image_corrupt", "image_corrupt", "image_missing"]
    assert "0x" not in records[0].decode()


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps the patch")
@pytest.mark.usefixtures("quick_look_for_dead_workers")
@pytest.mark.parametrize("kills", [1, 2])
def test_killed_image_workers_start_again_once(program, monkeypatch, capsys, tmp_path, kills):
    assert program() == 0
    expected = program.answers.read_bytes()
    load, limits = ImageLoader.load, Limits.suiting(torch.device("cpu"), 4)

    def killed(self, names):
        if "square.png" in names and torch.utils.data.get_worker_info() is not None:
            marks = [tmp_path / f"kill-{number}" for number in range(kills)]
            for mark in [mark for mark in marks if not mark.exists()][:1]:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return load(self, names)

    monkeypatch.setattr(ImageLoader, "load", killed)
    limits = dataclasses.replace(limits, threaded_groups=1)  # else threads read so few images
    monkeypatch.setattr(
        "llava.inference.batch.answer_batch.answer_batch", functools.partial(answer_batch, limits=limits)
    )
    capsys.readouterr()
    code = program("--overwrite", "--workers", 1)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if kills == 2:
        assert code == 2
        assert re.search(
            r"error: worker processes were killed twice, perhaps for want of memory; pass fewer --workers "
            r"\(0: threads\); \S+answers.jsonl.journal holds \d of 5 answers; run the same command without --overwrite "
            r"to resume\n",
            printed,
        )
        code = program("--workers", 1)
    assert code == 0
    assert program.answers.read_bytes() == expected


def test_chunks_join_to_the_whole(program):
    program()
    whole = program.records()
    for num_chunks in (2, 7):
        joined = []
        for index in range(num_chunks):
            program("--overwrite", num_chunks=num_chunks, chunk_idx=index)
            joined += program.records()
        assert joined == whole


REPEATED = [
    {"question_id": "x.jpg", "image": "tiny.png", "text": "Is it red?", "category": "a"},
    {"question_id": "x.jpg", "image": "tiny.png", "text": "Is it blue?"},
    {"question_id": "y.jpg", "image": "gone.png", "text": "What?"},
    {"question_id": "x.jpg", "image": "tiny.png", "text": "Is it red?"},  # the first line again
    {"question_id": "y.jpg", "image": "landscape.jpg", "text": "What?"},
    {"question_id": "y.jpg", "image": "landscape.jpg", "text": ""},
    {"question_id": "x.jpg", "text": "Is it red?"},
]


@pytest.mark.parametrize("flags", [(), ("--temperature", "1"), ("--num_beams", "2")])
def test_ids_that_repeat_have_a_line_each_in_order(program, monkeypatch, flags):
    """As in TextVQA's and MME's files, with chunks and with an interruption after any answer."""
    write_questions(program.questions, REPEATED)
    assert program(*flags) == 1
    whole, records = program.answers.read_bytes(), program.records()
    assert [record["question_id"] for record in records] == [row["question_id"] for row in REPEATED]
    assert [record["prompt"] for record in records] == [row["text"] for row in REPEATED]
    codes = [record.get("error") for record in records]
    assert codes == [None, None, "image_missing", None, None, "question_empty", None]
    assert len({record["answer_id"] for record in records}) == len(records)
    joined = b""
    for index in range(3):
        program("--overwrite", *flags, num_chunks=3, chunk_idx=index)
        joined += program.answers.read_bytes()
    assert joined == whole
    write = AnswersFile.write
    for kept in (1, 3, 5):

        def interrupted(self, answer, model_id, kept=kept):
            if self.done == kept:
                raise KeyboardInterrupt
            write(self, answer, model_id)

        with monkeypatch.context() as patch:
            patch.setattr(AnswersFile, "write", interrupted)
            assert program("--overwrite", *flags) == 130
        assert program(*flags) == 1
        assert program.answers.read_bytes() == whole


def test_a_seed_decides_what_is_drawn(program, capsys):
    hot = ("--temperature", "1.5", "--top_p", "0.95")
    files = []
    for flags in ((), ("--seed", "0"), ("--seed", "7"), ("--seed", "7", "--batch-size", "1")):
        assert program("--overwrite", *hot, *flags) == 0
        files.append(program.answers.read_bytes())
    assert files[0] == files[1] != files[2] == files[3]
    assert program(*hot) == 2
    assert "belongs to another run (seed was 7, is 0); pass --overwrite" in capsys.readouterr().err
    assert program(*hot, "--seed", "7") == 0


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def test_every_run_writes_the_same_bytes(program, tmp_path, goldens):
    """In this process and in two with another hash seed, with images that are broken in several ways."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = (goldens / "images" / "landscape.jpg").read_bytes()
    contents = {"good.jpg": image, "half.jpg": image[:2000], "text.jpg": b"<html></html>", "empty.jpg": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = [*contents, "none.jpg", "../images/good.jpg", "deep/"]
    rows = [{"question_id": key % 3, "image": name, "text": f"What is {key}?"} for key, name in enumerate(names * 2)]
    rows += [{"question_id": 0, "text": text} for text in ("", "long " * 600, "<image> so")]
    write_questions(program.questions, rows)
    arguments = program.arguments("--overwrite", image_folder=folder, max_new_tokens=2)
    assert program("--overwrite", image_folder=folder, max_new_tokens=2) == 1
    alone = program.answers.read_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llava.eval.model_vqa_loader", *arguments],
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [1, 0], errors
    assert program.answers.read_bytes() == alone
    assert b" at 0x" not in alone


def test_an_adapter_on_its_base_answers_differently(program, goldens):
    program()
    base = [record["text"] for record in program.records()]
    lora = {"model_path": goldens / "llava-v1.5-golden-task-lora", "model_base": goldens / "llava-v1.5-golden"}
    assert program("--overwrite", **lora) == 0
    assert [record["text"] for record in program.records()] != base
    assert {record["model_id"] for record in program.records()} == {"llava-v1.5-golden-task-lora"}


def test_an_output_that_may_not_be_written(program, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert program(answers_file=tmp_path / "file" / "answers.jsonl") == 2
    assert f"error: {tmp_path / 'file'}" in capsys.readouterr().err


def test_limit_takes_the_first(program):
    assert program(limit=2) == 0
    assert [record["question_id"] for record in program.records()] == [7, "b"]


def test_no_questions_no_answers(program):
    program.questions.write_text("")
    assert program() == 0
    assert program.records() == []


@pytest.mark.parametrize(
    "changed, difference",
    [
        ({"max_new_tokens": 6}, "max_new_tokens was 5, is 6"),
        ({"conv_mode": "llava_v0"}, "conv_mode was None, is 'llava_v0'"),
        ({"limit": 2}, "questions was"),
    ],
)
def test_another_run_on_the_same_file_is_refused(program, capsys, changed, difference):
    program()
    before = program.answers.read_bytes()
    program.flags.pop("--max_new_tokens")
    assert program(**{"max_new_tokens": 5, **changed}) == 2
    message = capsys.readouterr().err
    assert f"error: {program.answers} belongs to another run ({difference}" in message
    assert "pass --overwrite to start over, or choose another --answers-file" in message
    assert program.answers.read_bytes() == before


def test_bad_question_files_are_refused_before_any_work(program, monkeypatch, capsys):
    monkeypatch.setattr(answer_program, "load_session", None)
    program.questions.write_text('{"question_id": 1, "text": "a"}\n{"question_id": 1}\nnot json\n')
    assert program() == 2
    message = capsys.readouterr().err
    assert f"error: {program.questions}: 2 bad rows\n  line 2: text missing\n  line 3: not valid JSON" in message
    assert not program.answers.exists()


def test_a_missing_image_folder_is_refused(program, tmp_path, capsys):
    assert program(image_folder=tmp_path / "none") == 2
    assert f"error: --image-folder {tmp_path / 'none'} is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-chunks", "2", "--chunk-idx", "2"], "--chunk-idx 2 of --num-chunks 2: chunks are counted from 0"),
        (["--batch-size", "0"], "--batch-size is 0; choose 1 or more"),
        (["--limit", "-1"], "--limit is -1; choose 1 or more"),
        (["--temperature", "-1"], "--temperature is -1.0; choose 0 (greedy) or a positive number"),
        (["--top_p", "2"], "--top_p is 2.0; choose a probability above 0, at most 1"),
        (["--conv-mode", "v7"], "argument --conv-mode: invalid choice: 'v7'"),
        (["--device", "tpu9"], "argument --device: device 'tpu9' is unknown; choose cpu"),
        (["--load-8bit", "--load-4bit"], "argument --load-4bit: not allowed with argument --load-8bit"),
    ],
)
def test_wrong_usage(program, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        program(*flags)
    assert message in capsys.readouterr().err


def test_ctrl_c_in_a_real_process(program, fork, tmp_path):
    rows = [{"question_id": index, "image": "landscape.jpg", "text": f"What is {index}?"} for index in range(3000)]
    write_questions(program.questions, rows)
    arguments = program.arguments(batch_size=1, max_new_tokens=16)

    def interruptible():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run behind "&" ignore it
        return main(arguments)

    process = fork(interruptible, tmp_path / "errors")
    while not (program.journal.exists() and program.journal.stat().st_size) and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    errors = (tmp_path / "errors").read_text(encoding="utf-8")
    done = len(program.journal.read_text().splitlines())
    assert process.exitcode == 130
    assert f"stopped: {program.journal} holds {done} of 3000 answers; run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert 0 < done < 3000
