"""Files of answers that grow line by line and survive any interruption.

Beside `answers.jsonl` stands `answers.jsonl.run.json`, which says what run the answers belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llava.files import atomic_write
from llava.inference.questions import Question

RUN_SUFFIX = ".run.json"
_START_ANEW = "pass --overwrite to start anew, or choose another --answers-file"


@dataclass(frozen=True)
class Answer:
    """What became of a question.

    Attributes:
        question: as asked.
        text: the clean answer; "" where there is none.
        error: code of what was wrong with the row; None if it was answered.
        message: says so in words.
        scores: how sure the model is, for the record's metadata; None unless asked for.
    """

    question: Question
    text: str
    error: str | None = None
    message: str | None = None
    scores: Mapping[str, Any] | None = None

    def to_record(self, model_id: str) -> dict[str, Any]:
        """Return the line of the answers file, the same each time the same question is asked of the same model."""
        key = json.dumps([model_id, self.question.question_id, self.question.images, self.question.text])
        record = {
            "question_id": self.question.question_id,
            "prompt": self.question.text,
            "text": self.text,
            "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
            "model_id": model_id,
            "metadata": dict(self.scores or {}),
        }
        if self.error is None:
            return record
        return {**record, "metadata": {"error": self.error, "message": self.message}, "error": self.error}


class AnswersFile:
    """The answers of one run, in the order of its questions.

    Opening checks what is there and changes nothing; `begin` drops a torn last line, or everything if `overwrite`.

    Args:
        path: the file; missing parent directories are created.
        questions: of the run, in order.
        run: settings that decide the answers, by name; kept in the file beside.
        overwrite: start anew whatever is there.

    Attributes:
        done: number of questions answered before.
        errors: error codes of all answers in the file, counted.

    Raises:
        ValueError: if the file belongs to another run or doesn't fit the questions.
        OSError: if it can't be read or written.
    """

    def __init__(
        self, path: str | Path, questions: Sequence[Question], run: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.run_path = self.path.with_name(self.path.name + RUN_SUFFIX)
        self.done = 0
        self.errors: Counter[str] = Counter()
        self._run = dict(run)
        self._size = 0  # bytes that are kept
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file; choose another --answers-file")
        if not overwrite and self.path.exists() and self.path.stat().st_size:
            self._check_run()
            self._read(questions)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: each answer is with the operating system as soon as it is written.
        self._stream = self.path.open("ab", buffering=0)

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def begin(self) -> None:
        """Make the file ready for the next answer.

        Raises:
            OSError: if it can't be written.
        """
        self._stream.truncate(self._size)
        if not self.done:
            with atomic_write(self.run_path) as stream:
                stream.write(json.dumps(self._run, indent=2) + "\n")

    def write(self, answer: Answer, model_id: str) -> None:
        """Append one answer, as a whole or not at all.

        Raises:
            OSError: if the disk is full or the file can't be written.
        """
        line = (json.dumps(answer.to_record(model_id)) + "\n").encode()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError:
            self._stream.truncate(self._size)
            raise
        self._size += len(line)
        self.done += 1
        if answer.error is not None:
            self.errors[answer.error] += 1

    def _check_run(self) -> None:
        if not self.run_path.is_file():
            raise ValueError(f"{self.path} exists, but {self.run_path.name} is not beside it; {_START_ANEW}")
        try:
            before = json.loads(self.run_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.run_path} is damaged ({error}); {_START_ANEW}") from error
        if before == self._run:
            return
        differing = [
            f"{key} was {before.get(key)!r}, is {self._run.get(key)!r}"
            for key in dict.fromkeys((*self._run, *before))
            if before.get(key) != self._run.get(key)
        ]
        raise ValueError(f"{self.path} belongs to another run ({'; '.join(differing)}); {_START_ANEW}")

    def _read(self, questions: Sequence[Question]) -> None:
        """Count the complete lines; only the last may be torn."""
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn, or nothing
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                question_id = record["question_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} line {number} is no answer ({error!r}); {_START_ANEW}") from error
            expected = questions[number - 1].question_id if number <= len(questions) else None
            if question_id != expected:
                raise ValueError(
                    f"{self.path} line {number} answers question_id {question_id!r}, where the questions have "
                    f"{expected!r}; {_START_ANEW}"
                )
            if record.get("error"):
                self.errors[record["error"]] += 1
            self._size += len(line) + 1
            self.done += 1
