"""Answers files that are written atomically, and journals from which an interrupted run resumes.

During a run answers are appended to `answers.jsonl.journal`; `answers.jsonl` appears when they are complete. The
manifest `answers.jsonl.run.json` says which run they belong to.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_home
from llava.files.json_files import parse_json
from llava.files.regular_files import MAX_SETTINGS_BYTES, read_text
from llava.files.terminal_text import show
from llava.image_files.errors import NOT_READ
from llava.inference.batch.answer_records import check_record, parse_record
from llava.inference.batch.journal import Journal, read_lines
from llava.inference.batch.question_index import QuestionIndex, answer_id
from llava.inference.batch.questions import Question

RUN_SUFFIX = ".run.json"
JOURNAL_SUFFIX = ".journal"
_ANOTHER_FILE = "choose another --answers-file"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""Memory address in the text of some errors, which differs from run to run."""


@dataclass(frozen=True)
class Answer:
    """Answer to a question, or the error instead of it.

    Attributes:
        question: of the question file.
        text: the clean answer; "" with an error.
        error: code of the question's error; None if it was answered.
        message: describes the error.
        scores: logprobs for the record's metadata; None unless requested.
    """

    question: Question
    text: str
    error: str | None = None
    message: str | None = None
    scores: Mapping[str, Any] | None = None

    def to_record(self, model_id: str) -> dict[str, Any]:
        """Return the record in the answers file, reproducible from run to run."""
        record = {
            "question_id": self.question.question_id,
            "prompt": self.question.text,
            "text": self.text,
            "answer_id": answer_id(self.question, model_id),
            "model_id": model_id,
            "metadata": dict(self.scores or {}),
        }
        if self.error is None:
            return record
        message = _ADDRESS.sub("", self.message or "")
        return {**record, "metadata": {"error": self.error, "message": message}, "error": self.error}


class AnswersFile:
    """Answers file of one run: answers come in any order, and are written in the order of the questions.

    Each rank appends to a journal of its own; `finish` merges the journals into the file. Opening validates the
    existing files and changes nothing; `begin` drops an incomplete last line, or everything if `overwrite`.

    An image that could not be read (its disk may have been unmounted) is retried by the next run, whose answer
    replaces the error record.

    Args:
        path: the file; missing parent directories are created.
        questions: of the run, in order; no two are equal.
        run: settings that decide the answers, by name; kept in the manifest.
        overwrite: start over, whatever files exist.
        rank: of this process; rank 0 writes the common files.
        world_size: number of ranks.
        another_file: what to do instead of overwriting, for messages.
        record_keys: question -> keys that its record has besides, or that replace those of `Answer.to_record`.

    Attributes:
        journal_path: of this rank.
        done_questions: answered by this rank, or by any rank before opening.
        unread: number of records at opening whose images could not be read.
        errors: counts of the error codes of these answers.

    Raises:
        ValueError: if the file belongs to another run, doesn't match the questions, or is being written.
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
        world_size: int = 1,
        another_file: str = _ANOTHER_FILE,
        record_keys: Mapping[Question, Mapping[str, Any]] | None = None,
    ) -> None:
        self._way_out = f"pass --overwrite to start over, or {another_file}"
        self.path = Path(expand_home(path))
        self.run_path = self.path.with_name(self.path.name + RUN_SUFFIX)
        self.journal_path = self._journal_path(rank)
        self.done_questions: set[Question] = set()
        self.unread = 0
        self.errors: Counter[str] = Counter()
        self._unread_questions: set[Question] = set()
        self._questions, self._run, self._overwrite = questions, dict(run), overwrite
        self._rank, self._world_size, self._record_keys = rank, world_size, record_keys or {}
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is not a file; {another_file}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.journal_path)
        try:
            if not overwrite and any(place.stat().st_size for place in self.answer_files()):
                self._check_run()
                for question, _, _, record in self._read():
                    self._count(question, record)
                self._forget_unread()
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
        """Number of answered questions."""
        return len(self.done_questions)

    def begin(self) -> None:
        """Prepare the journal for the next answer.

        Raises:
            OSError: if it can't be written.
        """
        self._journal.begin(truncate=self._overwrite)
        if self._rank:
            return
        if self._overwrite:
            kept = {self._journal_path(rank) for rank in range(self._world_size)}  # each is emptied by its rank
            for place in set(self.answer_files()) - kept:
                place.unlink(missing_ok=True)
        if not self.done:
            with atomic_write(self.run_path) as stream:
                stream.write(json.dumps(self._run, indent=2) + "\n")

    def write(self, answer: Answer, model_id: str) -> None:
        """Append an answer to the journal, atomically.

        Raises:
            OSError: if the disk is full or the file can't be written.
        """
        with _uninterrupted():
            record = {**answer.to_record(model_id), **self._record_keys.get(answer.question, {})}
            self._journal.append(json.dumps(record).encode())
            self.done_questions.add(answer.question)
            if answer.error is not None:
                self.errors[answer.error] += 1

    def finish(self) -> None:
        """Write the answers of all ranks to the file, in order, and remove the journals.

        Raises:
            ValueError: if an answer is missing.
            OSError: if the file can't be written; the journals are kept.
        """
        self.done_questions, self.errors, self._unread_questions = set(), Counter(), set()
        places: dict[Question, tuple[Path, int]] = {}
        for question, place, offset, record in self._read():
            if self._count(question, record):
                places[question] = (place, offset)
        missing = [question.question_id for question in self._questions if question not in places]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} answers are missing, the first that of question_id {show(missing[0])}; "
                "run the same command again"
            )
        in_order = [places[question] for question in self._questions]
        if not self._is_written(in_order):
            with atomic_write(self.path, "wb") as stream:
                stream.writelines(_lines_at(in_order))
        self._journal.begin(truncate=True)  # closing it removes it when it is empty
        for place in set(self.answer_files()) - {self.path, self.journal_path}:
            place.unlink(missing_ok=True)

    def _journal_path(self, rank: int) -> Path:
        return self.path.with_name(self.path.name + JOURNAL_SUFFIX + (f".{rank}" if rank else ""))

    def answer_files(self) -> list[Path]:
        """Return the existing files that hold answers: the answers file and the journals."""
        journals = sorted(self.path.parent.glob(f"{glob.escape(self.path.name + JOURNAL_SUFFIX)}*"))
        return [self.path, *journals] if self.path.exists() else journals

    def _check_run(self) -> None:
        from llava.inference.batch.fingerprint import is_same_run_value  # imports torch

        if not self.run_path.is_file():
            raise ValueError(f"{self.path} exists, but its {self.run_path.name} does not; {self._way_out}")
        try:
            before = parse_json(read_text(self.run_path, most=MAX_SETTINGS_BYTES))
            if not isinstance(before, dict):
                raise TypeError("not a JSON object")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.run_path} is damaged ({error}); {self._way_out}") from error
        differing = [
            f"{key} was {show(before.get(key))}, is {show(self._run.get(key))}"
            for key in dict.fromkeys((*self._run, *before))
            if not is_same_run_value(key, before.get(key), self._run.get(key))
        ]
        if not differing:
            return
        raise ValueError(f"{self.path} belongs to another run ({'; '.join(differing)}); {self._way_out}")

    def _read(self) -> Iterator[tuple[Question, Path, int, dict[str, Any]]]:
        """Yield each answer's question, file, offset and record; only the last line of a file may be incomplete."""
        index = QuestionIndex(self._questions)
        for place in self.answer_files():
            for number, (offset, line) in enumerate(read_lines(place), start=1):
                try:
                    record = parse_record(line)
                    question = index.find(record)
                    check_record(record)
                except ValueError as error:
                    raise ValueError(f"{place} line {number} {error}; {self._way_out}") from error
                yield question, place, offset, record

    def _count(self, question: Question, record: Mapping[str, Any]) -> bool:
        """Count an answer; return whether it is its question's first one, or the first whose images were read."""
        if question in self._unread_questions:
            self._unread_questions.remove(question)
            self.errors -= Counter({NOT_READ: 1})
        elif question in self.done_questions:
            return False
        self.done_questions.add(question)
        code = record.get("error")
        if code:
            self.errors[code] += 1
        if code == NOT_READ:
            self._unread_questions.add(question)
        return True

    def _forget_unread(self) -> None:
        """Remove questions whose images could not be read from the answered ones, so that they are retried."""
        self.unread = len(self._unread_questions)
        self.done_questions -= self._unread_questions
        self._unread_questions.clear()
        del self.errors[NOT_READ]

    def _is_written(self, in_order: Sequence[tuple[Path, int]]) -> bool:
        """Return whether the file holds exactly these lines."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as stream:
            return all(line == there for line, there in itertools.zip_longest(_lines_at(in_order), stream))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, so that the counts match what was written.

    The handler is replaced instead of the signal blocked: a blocked signal is delivered to another thread, and Python
    raises in the main thread all the same.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python never raises it
    if not in_main_thread or signal.getsignal(signal.SIGINT) is None:  # None: another program's handler
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def _lines_at(places: Iterable[tuple[Path, int]]) -> Iterator[bytes]:
    """Yield the lines at these offsets of files, with their newlines."""
    with contextlib.ExitStack() as stack:
        streams: dict[Path, IO[bytes]] = {}
        for place, offset in places:
            if place not in streams:
                streams[place] = stack.enter_context(place.open("rb"))
            streams[place].seek(offset)
            yield streams[place].readline()
