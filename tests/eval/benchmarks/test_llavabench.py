"""LLaVA-Bench: the reviewer's messages, marks and summaries by hand, and the program against a server."""

from __future__ import annotations

import json
import socket

import pytest

from llava.eval import eval_gpt_review_bench, summarize_gpt_review
from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, QuestionLine
from llava.eval.benchmarks.llavabench import (
    build_review_requests,
    format_review_request,
    format_summary,
    read_marks,
    read_reviews,
    summarize_reviews,
)
from tests.local_server import QuietHandler, running_server

RULES = {"llava_bench_conv": {"role": "Assistant", "prompt": "Mark both."}}


@pytest.mark.parametrize(
    ("review", "marks"),
    [("8 7.5\nBoth are good.", (8, 7.5)), ("9,10", (9, 10)), ("8, 7", (8, 7)), ("8", (-1, -1)), ("8 7 6", (-1, -1)),
     ("good", (-1, -1)), ("", (-1, -1)), ("nan 7", (-1, -1))],
)  # fmt: skip
def test_marks_of_a_review(review, marks):
    assert read_marks(review) == marks


def test_the_reviewers_message():
    message = format_review_request("A cat.", "What?", "one", "two", RULES["llava_bench_conv"])
    assert message == (
        "[Context]\nA cat.\n\n[Question]\nWhat?\n\n[Assistant 1]\none\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\ntwo\n\n[End of Assistant 2]\n\n[System]\nMark both.\n\n"
    )


REVIEWS = [
    {"question_id": 0, "category": "llava_bench_conv", "tuple": [8, 6]},
    {"question_id": 1, "category": "llava_bench_detail", "tuple": [10, 9]},
    {"question_id": 2, "category": "llava_bench_conv", "tuple": [6, 5]},
    {"question_id": 3, "category": "llava_bench_conv", "tuple": [-1, -1]},
]


def test_a_summary_by_hand():
    means, notes = summarize_reviews(REVIEWS, "r")
    assert (
        format_summary(means)
        == "all 83.3 80.0 66.7\nllava_bench_conv 78.6 70.0 55.0\nllava_bench_detail 90.0 100.0 90.0"
    )
    assert notes == ("1 (3) of 4 reviews have no marks and are left out",)
    assert summarize_reviews(REVIEWS[::-1], "r")[0] == means
    assert format_summary(summarize_reviews(REVIEWS, "r", ["0", 2])[0]).startswith("all 90.0")


def test_the_summarizing_program(write_lines, tmp_path, capsys):
    write_lines("reviews/7b.jsonl", REVIEWS)
    write_lines("reviews/13b-0613.jsonl", [{"question_id": 0, "score": [5, 5]}])
    (tmp_path / "reviews/notes.txt").touch()
    rule = "=" * 33
    old = "7b\n1 (3) of 4 reviews have no marks and are left out\nall 83.3 80.0 66.7\n"
    old += f"llava_bench_conv 78.6 70.0 55.0\nllava_bench_detail 90.0 100.0 90.0\n{rule}\n"
    new = f"13b-0613\nall 100.0 50.0 50.0\n{rule}\n"
    folder = str(tmp_path / "reviews")
    for words, said in (
        (["-d", folder], new + old),
        (["-d", folder, "-v", "0613"], new),
        (["-d", folder, "-s", "7b"], old),
        (["-f", f"{folder}/13b-0613.jsonl"], new),
        (["-d", folder, "-f", "13b-0613.jsonl", "-i", "3"], new),
    ):
        assert summarize_gpt_review.main(words) == 0
        assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("reviews", "message"),
    [
        ([REVIEWS[0], REVIEWS[0]], "1 (0) questions are reviewed twice"),
        ([REVIEWS[3]], "0 of 1 reviews have marks"),
        ([{"question_id": 0, "tuple": [1]}], "'tuple' is [1], not two marks"),
        ([{"tuple": [1, 2]}], "no 'question_id'"),
        ([], "is empty"),
    ],
)
def test_reviews_that_are_none(write_lines, capsys, reviews, message):
    assert summarize_gpt_review.main(["-f", str(write_lines("r.jsonl", reviews))]) == 2
    assert message in capsys.readouterr().err


def test_no_reviews_are_selected(tmp_path, capsys):
    assert summarize_gpt_review.main(["-d", str(tmp_path)]) == 2
    assert "none of 0 files is selected" in capsys.readouterr().err
    assert summarize_gpt_review.main(["-d", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit) as end:
        summarize_gpt_review.main([])
    assert end.value.code == 2


class Reviewer(QuietHandler):
    """Stands in for the server: answers with what `replies` holds, (status, body), and notes what it was sent."""

    def do_POST(self):
        body = json.loads(self.read_body())
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        status, reply = self.server.replies.pop(0)
        self.send(status, json.dumps(reply).encode(), {"Location": "/elsewhere"} if status == 307 else {})


@pytest.fixture
def server():
    with running_server(Reviewer) as found:
        found.seen, found.replies = [], []
        yield found


def completion(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def review(server, write_lines, tmp_path, monkeypatch):
    """Return the function that runs the program on two questions."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(eval_gpt_review_bench, "_FIRST_WAIT", 0)
    questions = [{"question_id": n, "image": f"{n}.jpg", "text": f"What {n}?", "category": "conv"} for n in (0, 1)]
    answers = [{"question_id": n, "prompt": f"What {n}?", "text": f"text {n}"} for n in (0, 1)]
    (tmp_path / "rule.json").write_text(json.dumps(RULES))
    paths = {
        "--question": write_lines("q.jsonl", questions),
        "--context": write_lines(
            "c.jsonl", [{"image": "0.jpg", "caption": ["A cat.", "A mat."]}, {"image": "1.jpg", "caption": "A dog."}]
        ),
        "--rule": tmp_path / "rule.json",
        "--output": tmp_path / "reviews/7b.jsonl",
    }
    lists = [write_lines("gpt4.jsonl", [{**row, "answer_id": f"g{row['question_id']}"} for row in answers])]
    lists.append(write_lines("7b.jsonl", [{**row, "answer_id": f"m{row['question_id']}"} for row in answers[::-1]]))
    words = [str(word) for pair in paths.items() for word in pair]
    words += ["--answer-list", *map(str, lists), "--base-url", f"http://127.0.0.1:{server.server_port}/v1"]
    return lambda *more: eval_gpt_review_bench.main([*words, *more])


def test_answers_are_reviewed(review, server, tmp_path, capsys):
    server.replies = [completion("8 6\nFine."), (429, {}), (503, {}), completion("10 9")]
    assert review() == 0
    lines = read_reviews(tmp_path / "reviews/7b.jsonl")
    assert lines[0] == {
        "id": 1, "question_id": 0, "answer1_id": "g0", "answer2_id": "m0", "category": "llava_bench_conv",
        "content": "8 6\nFine.", "tuple": [8.0, 6.0],
    }  # fmt: skip
    assert [line["tuple"] for line in lines] == [[8, 6], [10, 9]]
    path, key, body = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt-4-0613", 1024, 0.2)
    assert body["messages"][1]["content"].startswith("[Context]\nA cat.\nA mat.\n\n[Question]\nWhat 0?")
    assert "all 83.3 90.0 75.0" in capsys.readouterr().out


def test_a_refusal_keeps_what_is_there_and_the_next_run_goes_on(review, server, tmp_path, capsys):
    server.replies = [completion("8 6"), (404, {"error": "no such model"})]
    assert review() == 2
    said = capsys.readouterr().err
    assert "answers 404" in said
    assert "no such model" in said
    assert "secret" not in said
    with (tmp_path / "reviews/7b.jsonl").open("a") as stream:
        stream.write('{"half')
    server.replies = [completion("what?")]
    assert review("--model", "another") == 0
    assert server.seen[-1][2]["model"] == "another"
    assert len(server.seen) == 3
    said = capsys.readouterr()
    assert "1 of 2 reviews exist already" in said.err
    assert "question_id 1: no marks in 'what?'" in said.out
    assert "1 (1) of 2 reviews have no marks and are left out" in said.out


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(503, {})] * 6, "can't be asked (503 {}); reviews so far are kept"),
        ([(307, {})], "answers 307 {}; check --model, --base-url and the key"),
        ([(200, {"choices": []})], "which is not a chat completion; check --base-url"),
        ([(200, [])], "which is not a chat completion"),
    ],
)
def test_servers_that_do_not_answer(review, server, capsys, replies, message):
    server.replies = list(replies)
    assert review() == 2
    assert message in capsys.readouterr().err
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}


def test_a_server_that_is_not_there(review, capsys):
    with socket.socket() as bound:  # nobody listens there, and nobody else can
        bound.bind(("127.0.0.1", 0))
        assert review("--base-url", f"http://127.0.0.1:{bound.getsockname()[1]}/v1") == 2
    assert "can't be asked" in capsys.readouterr().err


def test_reviews_of_other_answers_are_refused(review, write_lines, capsys):
    write_lines("reviews/7b.jsonl", [{"question_id": 0, "answer1_id": "g0", "answer2_id": "x", "tuple": [1, 2]}])
    assert review() == 2
    assert "holds reviews of other answers, such as question_id 0; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        ([], "", "set OPENAI_API_KEY to a key of http://127.0.0.1"),
        (["--base-url", "file:///etc"], "x", "--base-url file:///etc is not an http(s) address"),
    ],
)
def test_usage_errors(review, monkeypatch, capsys, words, key, message):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as end:
        review(*words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_captions_and_rules_that_are_missing(tmp_path, write_lines, review, capsys):
    question = QuestionLine(0, "What?", "0.jpg", {"category": "detail"})
    answers = [AnswerLine(0, "What?", "x", None, {})]
    with pytest.raises(BenchmarkError, match=r"1 \(0\) of 1 questions have an .* 1 \(llava_bench_detail\) of their"):
        build_review_requests([question], ("a", answers), ("b", answers), {}, RULES)
    write_lines("c.jsonl", [{"image": "0.jpg"}])
    assert review() == 2
    assert "no 'image' and 'caption'" in capsys.readouterr().err
    (tmp_path / "rule.json").write_text("[]")
    write_lines("c.jsonl", [{"image": "0.jpg", "caption": ""}])
    assert review() == 2
    assert "give the original's table/rule.json" in capsys.readouterr().err
