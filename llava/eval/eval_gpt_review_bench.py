"""Review answers to LLaVA-Bench with a language model behind an OpenAI-compatible server; `--help` has an example."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.lines import BenchmarkError, count_errors, read_answer_lines, read_question_lines
from llava.eval.benchmarks.llavabench import (
    SYSTEM,
    UNREADABLE,
    ReviewRequest,
    build_review_requests,
    format_summary,
    read_captions,
    read_marks,
    read_reviews,
    read_rules,
    summarize_reviews,
)
from llava.files.home_directory import expand_homes
from llava.files.json_files import parse_json
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text, shorten, show
from llava.inference.batch.journal import Journal
from llava.inference.command_line import run_program

_KEY = "OPENAI_API_KEY"
_TEMPERATURE = 0.2  # the original's
_ATTEMPTS = 6
_FIRST_WAIT = 1.0  # seconds; each further one is twice as long
_TIMEOUT_SECONDS = 300
_MOST_BYTES = 10_000_000  # of a server's answer
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_EXAMPLE = """example:
  OPENAI_API_KEY=... python -m llava.eval.eval_gpt_review_bench --rule rule.json --question questions.jsonl \\
      --context context.jsonl --answer-list answers_gpt4.jsonl answers/llava-v1.5-7b.jsonl \\
      --output reviews/llava-v1.5-7b.jsonl

Questions, contexts and reference answers are those of liuhaotian/llava-bench-in-the-wild, rule.json is the original's
llava/eval/table/rule.json. Each review costs a request; reviews that the output has already are kept, so the same
command goes on after an interruption. Scores compare only if the same reviewer gave them.

exit code: 0 all reviewed, 2 stopped by an error, 130 interrupted
"""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse; urllib then raises the response as an `HTTPError`."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.eval_gpt_review_bench",
        "Review answers to LLaVA-Bench with a language model behind an OpenAI-compatible server.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add("-q", "--question", required=True, metavar="JSONL", help="questions")
    add("-c", "--context", required=True, metavar="JSONL", help="captions of the images")
    add("-a", "--answer-list", nargs=2, required=True, metavar="JSONL", help="reference answers, and the model's")
    add("-r", "--rule", required=True, metavar="JSON", help="how each category is marked")
    add("-o", "--output", required=True, metavar="JSONL", help="reviews; what is there already is kept")
    add("--max-tokens", type=int, default=1024, help="longest review, in tokens (default: %(default)s)")
    add("--model", default="gpt-4-0613", help="the reviewer (default: %(default)s)")
    add("--base-url", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        help="of the server (default: %(default)s, or OPENAI_BASE_URL)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, as in `--help`."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "question", "context", "answer_list", "rule", "output")
    if urllib.parse.urlsplit(args.base_url).scheme not in ("http", "https"):
        parser.error(f"--base-url {args.base_url} is not an http(s) address")
    inputs = {"--question": args.question, "--context": args.context, "--answer-list": args.answer_list}
    message = find_overwrite({"--output": output_file(args.output)}, {**inputs, "--rule": args.rule})
    if message:
        parser.error(message)
    if not os.environ.get(_KEY):
        parser.error(f"set {_KEY} to a key of {args.base_url} (a server without keys takes any text)")
    return run_program(lambda: review(args))


def review(args: argparse.Namespace) -> None:
    """Write the reviews that are missing, then print the summary.

    Raises:
        BenchmarkError: if files don't belong together, or the server refuses.
        OSError: if the output can't be written.
    """
    reference, model = ((path, read_answer_lines(path)) for path in args.answer_list)
    requests = build_review_requests(
        read_question_lines(args.question), reference, model, read_captions(args.context), read_rules(args.rule)
    )
    for note in count_errors(model[1], "are reviewed as empty answers"):
        print_text(note)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Journal(path)) as journal:
        journal.begin()
        done = _read_done(path, requests)
        if done:
            print(f"{path}: {len(done)} of {len(requests)} reviews exist already", file=sys.stderr)
        for request in requests:
            if request.keys["question_id"] not in done:
                text = request_review(
                    request.content, args.base_url, os.environ[_KEY], model=args.model, max_tokens=args.max_tokens
                )
                marks = read_marks(text)
                if marks == UNREADABLE:
                    print_text(f"question_id {request.keys['question_id']}: no marks in {show(shorten(text, 200))}")
                journal.append(json.dumps({**request.keys, "content": text, "tuple": list(marks)}).encode())
    means, notes = summarize_reviews(read_reviews(path), str(path))
    print_text("\n".join([*notes, format_summary(means), f"wrote {path}: {len(requests)} reviews"]))


def request_review(
    content: str,
    base_url: str,
    key: str,
    *,
    model: str,
    max_tokens: int,
) -> str:
    """Return the reviewer's answer; a busy server is asked again, after longer and longer waits.

    Args:
        content: of the user's message.
        base_url: of the server, such as https://api.openai.com/v1.
        key: is sent to this server alone.
        model: name of the reviewer.
        max_tokens: longest answer.

    Raises:
        BenchmarkError: if the server refuses, or can't be reached in several attempts.
    """
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "temperature": _TEMPERATURE, "max_tokens": max_tokens}
    address = f"{base_url.rstrip('/')}/chat/completions"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "User-Agent": "llava"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                return _read_message(response.read(_MOST_BYTES), address)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {shorten(error.read(_MOST_BYTES).decode(errors='replace'), 400)}"
            if error.code not in _BUSY:
                raise BenchmarkError(f"{address} answers {reason}; check --model, --base-url and the key") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
    raise BenchmarkError(f"{address} can't be asked ({reason}); reviews so far are kept: run the same command again")


def _read_message(data: bytes, address: str) -> str:
    try:
        text = parse_json(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BenchmarkError(f"{address} answers {show(data[:400])}, which is not a chat completion; check --base-url")
    return text


def _read_done(path: Path, requests: Sequence[ReviewRequest]) -> set[int | str]:
    """Return the ids of the questions whose reviews are there.

    Raises:
        BenchmarkError: if there are reviews of other answers.
    """
    if not path.stat().st_size:
        return set()
    keys = {request.keys["question_id"]: request.keys for request in requests}
    reviews = read_reviews(path)
    for line in reviews:
        wanted = keys.get(line["question_id"])
        if wanted is None or any(line.get(name) != wanted[name] for name in ("answer1_id", "answer2_id")):
            raise BenchmarkError(
                f"{path} holds reviews of other answers, such as question_id {show(line['question_id'])}; choose "
                "another --output"
            )
    return {line["question_id"] for line in reviews}


if __name__ == "__main__":
    raise SystemExit(main())
