"""Files of answers that survive any interruption.

While a run lasts its answers stand in `answers.jsonl.journal`; `answers.jsonl` itself appears when they are complete.
Beside it stands `answers.jsonl.run.json`, which says what run the answers belong to.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llava.files import atomic_write
from llava.inference.journal import Journal, split_lines
from llava.inference.questions import Question

RUN_SUFFIX = ".run.json"
JOURNAL_SUFFIX = ".journal"
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
    """The answers of one run, which come in any order and end up in the order of its questions.

    While the run lasts they stand in a journal beside the file, `answers.jsonl.journal`, one line each; of several
    processes each has its own. `finish` puts them in order and moves the file into place. Opening checks what is there
    and changes nothing; `begin` drops a torn last line, or everything if `overwrite`.

    Args:
        path: the file; missing parent directories are created.
        questions: of the run, in order.
        run: settings that decide the answers, by name; kept in the file beside.
        overwrite: start anew whatever is there.
        rank: number of this process among those that share the run; the first looks after the common files.
        n_ranks: number of these processes.

    Attributes:
        journal_path: of this process.
        done_ids: ids of the questions that were answered before or since, by this process or before by any.
        errors: error codes of all these answers, counted.

    Raises:
        ValueError: if the file belongs to another run, doesn't fit the questions, or is being written.
        OSError: if it can't be read or written.
    """

    def __init__(
        self,
        path: str | Path,
        questions: Sequence[Question],
        run: Mapping[str, Any],
        *,
        overwrite: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        self.path = Path(path)
        self.run_path = self.path.with_name(self.path.name + RUN_SUFFIX)
        self.journal_path = self._journal_path(rank)
        self.done_ids: set[int | str] = set()
        self.errors: Counter[str] = Counter()
        self._questions, self._run, self._overwrite = questions, dict(run), overwrite
        self._rank, self._n_ranks = rank, n_ranks
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file; choose another --answers-file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.journal_path)
        try:
            if not overwrite and any(place.stat().st_size for place in self._places()):
                self._check_run()
                self._count(self._read())
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.close()

    @property
    def done(self) -> int:
        """Number of questions that have their answer."""
        return len(self.done_ids)

    def begin(self) -> None:
        """Make the journal ready for the next answer.

        Raises:
            OSError: if it can't be written.
        """
        self._journal.begin(anew=self._overwrite)
        if self._rank:
            return
        if self._overwrite:
            kept = {self._journal_path(rank) for rank in range(self._n_ranks)}  # their owners empty them
            for place in set(self._places()) - kept:
                place.unlink(missing_ok=True)
        if not self.done:
            with atomic_write(self.run_path) as stream:
                stream.write(json.dumps(self._run, indent=2) + "\n")

    def write(self, answer: Answer, model_id: str) -> None:
        """Append one answer to the journal, as a whole or not at all.

        Raises:
            OSError: if the disk is full or the file can't be written.
        """
        self._journal.append(json.dumps(answer.to_record(model_id)).encode())
        self.done_ids.add(answer.question.question_id)
        if answer.error is not None:
            self.errors[answer.error] += 1

    def finish(self) -> None:
        """Put all answers, those of other processes too, in order into the file, and remove the journals.

        Raises:
            ValueError: if an answer is missing.
            OSError: if the file can't be written; the journals are then kept.
        """
        lines = self._read()
        missing = [question.question_id for question in self._questions if question.question_id not in lines]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} answers are missing, the first that of question_id {missing[0]!r}; "
                "run the same command again"
            )
        content = b"".join(lines[question.question_id] + b"\n" for question in self._questions)
        if not self.path.exists() or self.path.read_bytes() != content:
            with atomic_write(self.path, "wb") as stream:
                stream.write(content)
        self.done_ids, self.errors = set(), Counter()
        self._count(lines)
        self._journal.begin(anew=True)  # empty, it is removed by closing it
        for place in set(self._places()) - {self.path, self.journal_path}:
            place.unlink(missing_ok=True)

    def _journal_path(self, rank: int) -> Path:
        return self.path.with_name(self.path.name + JOURNAL_SUFFIX + (f".{rank}" if rank else ""))

    def _places(self) -> list[Path]:
        """Return the files that hold answers: the file itself, if it is there, and the journals."""
        journals = sorted(self.path.parent.glob(f"{glob.escape(self.path.name + JOURNAL_SUFFIX)}*"))
        return [self.path, *journals] if self.path.exists() else journals

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

    def _read(self) -> dict[int | str, bytes]:
        """Return the line of each answer; only the last line of a file may be torn."""
        known = {question.question_id for question in self._questions}
        lines: dict[int | str, bytes] = {}
        for place in self._places():
            for number, line in enumerate(split_lines(_content(place)), start=1):
                try:
                    question_id = json.loads(line)["question_id"]
                    is_known = question_id in known
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{place} line {number} is no answer ({error!r}); {_START_ANEW}") from error
                if not is_known:
                    raise ValueError(
                        f"{place} line {number} answers question_id {question_id!r}, which is not among the questions; "
                        f"{_START_ANEW}"
                    )
                lines.setdefault(question_id, line)
        return lines

    def _count(self, lines: Mapping[int | str, bytes]) -> None:
        self.done_ids |= lines.keys()
        self.errors.update(record["error"] for record in map(json.loads, lines.values()) if record.get("error"))


def _content(place: Path) -> bytes:
    """Return what a file holds: nothing if it was the empty journal of a process that has left meanwhile."""
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return b""
