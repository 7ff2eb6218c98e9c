"""The suite answers several benchmarks with one load, resumes, scores, compares, and lists what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval import suite
from llava.eval.benchmarks.catalog import BENCHMARKS, NAMES, find_benchmark
from llava.inference.batch.answers_file import AnswersFile

REPOSITORY = Path(__file__).resolve().parents[3]
POPE_ANSWERS, VIZWIZ_ANSWERS = "pope/answers/llava-tiny.jsonl", "vizwiz/answers/llava-tiny.jsonl"


def table_line(text: str, start: str) -> list[str]:
    """Words of the last line that starts so."""
    return [line for line in text.splitlines() if line.startswith(start)][-1].split()


def test_two_benchmarks_with_one_load(data, loads, capsys):
    data.lay_out_pope()
    data.lay_out_vizwiz()
    assert data("pope,vizwiz") == 0
    assert loads == ["llava-tiny"]
    assert [line["question_id"] for line in data.answers(POPE_ANSWERS)] == list(range(1, 28))
    assert {line["model_id"] for line in data.answers(VIZWIZ_ANSWERS)} == {"llava-tiny"}
    out = capsys.readouterr().out
    assert table_line(out, "POPE  ")[:8] == ["POPE", "27", "27", "F1", "score,", "mean", "of", "3"]
    assert table_line(out, "VizWiz  ")[:7] == ["VizWiz", "2", "-", "not", "scored", "here", "-"]
    upload = data.folder / "vizwiz/answers_upload/llava-tiny.json"
    assert [entry["image"] for entry in json.loads(upload.read_text())] == [
        "VizWiz_test_00000000.jpg",
        "VizWiz_test_00000001.jpg",
    ]
    assert f"VizWiz: wrote {upload}; submit it to https://eval.ai/" in out


def test_the_second_run_has_nothing_to_do(data, loads, capsys):
    data.lay_out_pope()
    data.lay_out_vizwiz()
    assert data("pope") == 0
    first, before = capsys.readouterr().out, (data.folder / POPE_ANSWERS).read_bytes()
    assert data("pope") == 0
    again = capsys.readouterr().out
    assert loads == ["llava-tiny"]
    assert table_line(again, "POPE  ")[:-1] == table_line(first, "POPE  ")[:-1]
    assert table_line(again, "POPE  ")[-1] == "-"
    assert (data.folder / POPE_ANSWERS).read_bytes() == before
    assert data("pope,vizwiz") == 0
    assert loads == ["llava-tiny"] * 2


def test_an_interrupted_suite_resumes(data, loads, monkeypatch, capsys):
    data.lay_out_pope()
    data.lay_out_vizwiz()
    assert data("pope") == 0
    whole = (data.folder / POPE_ANSWERS).read_bytes()
    write = AnswersFile.write

    def stop_at_the_fifth(self, answer, model_id):
        if self.done == 5:
            raise KeyboardInterrupt
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "write", stop_at_the_fifth)
    assert data("vizwiz,pope", "--overwrite") == 130
    monkeypatch.undo()
    assert "holds 5 of 27 answers; run the same command without --overwrite to resume" in capsys.readouterr().err
    assert data("vizwiz,pope") == 0
    assert "5 of 27 answers exist already" in capsys.readouterr().err
    assert (data.folder / POPE_ANSWERS).read_bytes() == whole


@pytest.mark.slow
def test_a_killed_script_resumes(data, capsys):
    """A real script, killed as soon as its journal has an answer, or let through if it is faster."""
    data.lay_out_pope(images=40)
    environment = {**os.environ, "MODEL": str(data.model), "DATA": str(data.folder), "OMP_NUM_THREADS": "1"}
    command = ["bash", "scripts/v1_5/eval/pope.sh", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    journal = data.folder / f"{POPE_ANSWERS}.journal"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # to Python itself, which the script has become
    process.wait()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert table_line(done.stdout, "POPE  ")[1] == "360"
    assert len(data.answers(POPE_ANSWERS)) == 360
    assert not journal.exists()


def test_a_base_is_answered_and_compared(data, loads, goldens, capsys, tmp_path):
    data.lay_out_pope()
    base, output = goldens / "llava-v1.5-golden", tmp_path / "suite.json"
    assert data("pope", "--compare-with", base, "--json", output) == 0
    assert loads == ["llava-v1.5-golden", "llava-tiny"]
    out = capsys.readouterr().out
    assert "llava-tiny against llava-v1.5-golden, difference of the questions' mean score in points" in out
    content = json.loads(output.read_text())
    assert [result["model"] for result in content["results"]] == ["llava-v1.5-golden", "llava-tiny"]
    [comparison] = content["comparisons"]
    assert comparison["questions"] == 27
    accuracy = [{one["name"]: one["value"] for one in result["figures"]} for result in content["results"]]
    means = [figures["accuracy, mean of 3 splits"] for figures in accuracy]
    assert 100 * comparison["mean"] == pytest.approx(means[1] - means[0])


def test_what_is_missing_is_listed_before_a_model_is_loaded(data, loads, capsys):
    data.lay_out_vizwiz()
    (data.folder / "vizwiz/test/VizWiz_test_00000001.jpg").unlink()
    assert data("pope,vizwiz") == 2
    err = capsys.readouterr().err
    folder = data.folder
    assert f"{folder}/pope/llava_pope_test.jsonl is missing; it comes from eval.zip: https://drive.google.com/" in err
    assert f"{folder}/pope/val2014 is missing; it comes from http://images.cocodataset.org/zips/val2014.zip" in err
    assert f"{folder}/pope/coco is missing; it comes from https://github.com/AoiDragon/POPE/tree/e3e3926" in err
    assert f"{folder}/vizwiz/test lacks 1 of 2 images, the first VizWiz_test_00000001.jpg; it comes from" in err
    assert loads == []


def test_an_empty_question_file_and_a_broken_one(data, loads, capsys):
    data.lay_out_vizwiz()
    path = data.write_lines("vizwiz/llava_test.jsonl", [])
    assert data("vizwiz") == 2
    assert f"{path} holds no questions; it comes from eval.zip" in capsys.readouterr().err
    data.write_lines("vizwiz/llava_test.jsonl", [{"a": 1}])
    assert data("vizwiz") == 2
    assert f"{path}: 1 bad row\n  line 1: question_id and text missing" in capsys.readouterr().err
    assert loads == []


def test_nothing_to_compare_is_said(data, goldens, capsys):
    data.lay_out_vizwiz()
    assert data("vizwiz", "--compare-with", goldens / "llava-v1.5-golden") == 0
    assert "nothing is compared: no benchmark has scores of both" in capsys.readouterr().out


def test_a_missing_checkpoint_is_found_before_the_first_model_answers(data, loads, capsys):
    data.lay_out_vizwiz()
    assert data("vizwiz", "--compare-with", data.folder / "no-such-model") == 2
    assert "no-such-model" in capsys.readouterr().err
    assert data("vizwiz", model=data.folder / "another") == 2
    assert loads == []


def test_the_rest_runs_if_asked_for(data, capsys):
    data.lay_out_vizwiz()
    assert data("pope,vizwiz") == 2
    assert "or pass --skip-missing for the other 1" in capsys.readouterr().err
    assert data("pope,vizwiz", "--check") == 2
    capsys.readouterr()
    assert data("vizwiz", "--check") == 0
    assert capsys.readouterr().out == "all files of vizwiz are there\n"
    assert data("pope,vizwiz", "--skip-missing") == 0
    captured = capsys.readouterr()
    assert "POPE (pope) can't run:" in captured.err
    assert "left out" in captured.err
    assert table_line(captured.out, "VizWiz  ")[1] == "2"
    assert data("pope", "--skip-missing") == 2


def test_a_limited_run_goes_beside(data, capsys):
    data.lay_out_pope()
    assert data("pope", "--limit", 4) == 0
    assert len(data.answers("pope/answers/llava-tiny.first-4.jsonl")) == 4
    assert table_line(capsys.readouterr().out, "POPE  ")[1] == "4"
    assert not (data.folder / POPE_ANSWERS).exists()


def test_a_damaged_image_counts_as_wrong_and_is_said(data, capsys):
    data.lay_out_pope()
    (data.folder / "pope/val2014/COCO_val2014_000000000001.jpg").write_bytes(b"<html>404</html>")
    assert data("pope") == 1
    captured = capsys.readouterr()
    assert "9 questions have no answer" in captured.err
    assert "POPE: 9 of 27 answers are errors and count as wrong (image_corrupt 9)" in captured.out


def test_a_benchmark_that_can_t_be_scored_does_not_stop_the_others(data, capsys):
    data.lay_out_pope()
    data.lay_out_vizwiz()
    (data.folder / "pope/coco/coco_pope_popular.json").unlink()
    assert data("pope,vizwiz") == 2
    captured = capsys.readouterr()
    assert "error: POPE is not scored: " in captured.err
    assert "no coco_pope_popular.json" in captured.err
    assert table_line(captured.out, "VizWiz  ")[1] == "2"


def test_answers_of_another_run_are_kept(data, capsys):
    data.lay_out_vizwiz()
    assert data("vizwiz") == 0
    before = (data.folder / VIZWIZ_ANSWERS).read_bytes()
    data.lay_out_vizwiz(images=3)
    capsys.readouterr()
    assert data("vizwiz") == 2
    path = data.folder / VIZWIZ_ANSWERS
    message = capsys.readouterr().err
    assert f"{path} belongs to another run (questions was" in message
    assert f"pass --overwrite to start over, or move {path} away" in message
    assert path.read_bytes() == before


def test_score_only_needs_answers_and_no_model(data, loads, capsys):
    data.lay_out_pope()
    assert data("pope", "--score-only") == 2
    assert f"{data.folder / POPE_ANSWERS}\nanswer first, without the flag" in capsys.readouterr().err
    assert data("pope") == 0
    (data.folder / "pope/val2014").rename(data.folder / "elsewhere")
    assert data("pope", "--score-only", model="no/such/llava-tiny") == 0
    assert loads == ["llava-tiny"]


def test_benchmarks_without_answers_are_left_out_on_request(data, loads, capsys):
    data.lay_out_pope()
    data.lay_out_scienceqa()
    assert data("pope") == 0
    capsys.readouterr()
    assert data("pope,scienceqa", "--score-only") == 2
    assert capsys.readouterr().err.endswith("or pass --skip-missing for the other 1\n")
    assert data("pope,scienceqa", "--score-only", "--skip-missing") == 0
    printed = capsys.readouterr()
    assert f"{data.folder / 'scienceqa/answers/llava-tiny.jsonl'}\nleft out" in printed.err
    assert table_line(printed.out, "POPE  ")[0] == "POPE"
    assert data("scienceqa", "--score-only", "--skip-missing") == 2
    assert "answer first, without the flag" in capsys.readouterr().err


def test_scripts_of_the_originals_names_run_to_the_end(data):
    data.lay_out_scienceqa()
    environment = {**os.environ, "MODEL": str(data.model), "DATA": str(data.folder), "OMP_NUM_THREADS": "1"}
    command = ["bash", "scripts/v1_5/eval/sqa.sh", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert table_line(done.stdout, "ScienceQA  ")[:3] == ["ScienceQA", "2", "2"]
    assert [line["prompt"] for line in data.answers("scienceqa/answers/llava-tiny.jsonl")] == [
        "<image>\nWhich is it?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        "Which rhymes?\nA. so\nB. go\nAnswer with the option's letter from the given choices directly.",
    ]


def test_ids_that_repeat(data, capsys):
    data.lay_out_textvqa()
    assert data("textvqa") == 0
    assert table_line(capsys.readouterr().out, "TextVQA  ")[1:3] == ["2", "2"]
    assert [line["question_id"] for line in data.answers("textvqa/answers/llava-tiny.jsonl")] == ["a", "a"]
    assert data("textvqa", "--limit", 1) == 0
    assert table_line(capsys.readouterr().out, "TextVQA  ")[1:3] == ["1", "1"]


def test_mme_writes_the_files_of_its_own_program(data, capsys):
    data.lay_out_mme()
    assert data("mme", "--limit", 3) == 0
    out = capsys.readouterr().out
    assert "MME: scored with all questions only" in out
    assert "wrote" not in out.partition("MME: ")[2]
    assert data("mme") == 0
    assert table_line(capsys.readouterr().out, "MME  ")[:4] == ["MME", "4", "4", "perception"]
    files = sorted(path.name for path in (data.folder / "MME/eval_tool/answers/llava-tiny").iterdir())
    assert files == ["artwork.txt", "color.txt"]


def test_mmbench_in_both_languages(data, loads, capsys):
    data.lay_out_mmbench()
    data.lay_out_mmbench("cn")
    assert data("mmbench,mmbench_cn") == 0
    assert loads == ["llava-tiny"]
    lines = data.answers("mmbench/answers/mmbench_dev_20230712/llava-tiny.jsonl")
    assert lines[2]["prompt"].splitlines() == ["Look.", "What is it?", "A. a dog", "B. a wall", "C. a cat"]
    assert lines[2]["options"] == ["a dog", "a wall", "a cat"]
    assert len(data.answers("mmbench_cn/answers/mmbench_dev_cn_20231003/llava-tiny.jsonl")) == 3
    out = capsys.readouterr().out
    assert table_line(out, "MMBench  ")[:5] == ["MMBench", "3", "2", "circular", "accuracy"]
    for upload in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003"):
        assert (data.folder / f"mmbench/answers_upload/{upload}/llava-tiny.xlsx").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "pope,nothing"], "'nothing' is not a benchmark; choose among vqav2, gqa"),
        (["--suite", "pope,pope"], "'pope,pope' names a benchmark twice; give each once"),
        (["--suite", "sqa,scienceqa"], "names a benchmark twice"),
        (["--limit", "0"], "--limit is 0; choose 1 or more"),
        (["--workers", "-1"], "--workers is -1; choose 0 or more"),
        (["--score-only", "--overwrite"], "--overwrite discards the answers that --score-only scores"),
        (["--compare-with", "other/llava-tiny"], "--model-path and --compare-with are both named llava-tiny"),
    ],
)
def test_wrong_flags(data, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        data("pope", *words)
    assert message in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        suite.main(["--help"])
    assert ", ".join(NAMES) in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_each_benchmark_has_a_script_and_origins(benchmark):
    script = REPOSITORY / f"scripts/v1_5/eval/{benchmark.name}.sh"
    assert f'benchmark {benchmark.name} "$@"' in script.read_text(encoding="utf-8")
    needed = {benchmark.question_file, benchmark.images, *benchmark.annotations} - {None}
    assert set(benchmark.origins) == needed
    assert find_benchmark(benchmark.name) is benchmark


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(data, capsys):
    data.lay_out_pope()
    data.lay_out_vizwiz()
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llava.eval.suite"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *data.words("pope,vizwiz")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("27 of 27 questions answered") == 1
    both = (data.folder / POPE_ANSWERS).read_bytes()
    assert data("pope", "--overwrite") == 0
    assert (data.folder / POPE_ANSWERS).read_bytes() == both
