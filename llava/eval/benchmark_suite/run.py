"""Answer and score benchmarks with one model, which is loaded once."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.answer_questions import answer_questions
from llava.eval.benchmark_suite.files import Prepared
from llava.eval.benchmark_suite.outcome import Outcome
from llava.eval.benchmark_suite.scores import ScoreFiles, score
from llava.files.terminal_text import report_error
from llava.inference.command_line import REFUSED, load_session
from llava.inference.distributed import DistributedRank
from llava.inference.sampling import Sampling
from llava.model_names import get_model_name_from_path

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.inference.session import Session


class OneLoad:
    """Loads the model when it is first needed, and keeps it for the benchmarks that follow.

    Attributes:
        calls: how often the model was needed.
        seconds: that loading took.
    """

    def __init__(self, load: Callable[[], Session]) -> None:
        self.calls, self.seconds = 0, 0.0
        self._load = load
        self._session: Session | None = None

    def __call__(self) -> Session:
        """Return the loaded model."""
        self.calls += 1
        if self._session is None:
            start = time.perf_counter()
            self._session = self._load()
            self.seconds = time.perf_counter() - start
        return self._session

    def close(self) -> None:
        """Free the model's memory."""
        self._session = None
        gc.collect()


def name_model(args: argparse.Namespace) -> str:
    """Return the model's name in the paths of its answers, with the number of questions if not all are asked."""
    name = get_model_name_from_path(args.model_path)
    return name if args.limit is None else f"{name}.first-{args.limit}"


def run_model(
    args: argparse.Namespace, parts: Sequence[Prepared], rank: DistributedRank, wait: Callable[[], None]
) -> tuple[int, list[Outcome] | None]:
    """Answer and score benchmarks with one model.

    Args:
        args: flags of `llava.eval.suite`, and those of `model_vqa_loader` that it lacks.
        parts: benchmarks with their questions.
        rank: of this process.
        wait: barrier of all ranks.

    Returns:
        The exit code, and on rank 0 an outcome for each benchmark that could be scored; None if the run was stopped.
    """
    load = OneLoad(lambda: load_session(args, compiles=args.compile))
    worst, outcomes = 0, []
    try:
        for part in parts:
            seconds = None
            if not args.score_only:
                code, seconds = _answer(args, part, rank, wait, load)
                if code > 1:
                    return code, None
                worst = max(worst, code)
            if rank.rank == 0:
                outcome = _score(args, part, seconds)
                worst = REFUSED if outcome is None else worst
                outcomes += [outcome] if outcome else []
    finally:
        load.close()
    return worst, outcomes


def _answer(
    args: argparse.Namespace, part: Prepared, rank: DistributedRank, wait: Callable[[], None], load: OneLoad
) -> tuple[int, float | None]:
    """Return the exit code, and the seconds that answering took; None if all answers existed."""
    benchmark = part.benchmark
    if rank.rank == 0:
        print(f"{benchmark.title}: {len(part.questions)} questions", file=sys.stderr)
    path = benchmark.answers_path(Path(args.data), name_model(args))
    flags = argparse.Namespace(**vars(args), image_folder=str(part.images), answers_file=str(path))
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
    calls, loading, start = load.calls, load.seconds, time.perf_counter()
    files = {"another_file": f"move {path} away", "record_keys": part.record_keys}
    code = answer_questions(flags, sampling, part.questions, rank, wait, load, **files)
    seconds = time.perf_counter() - start - (load.seconds - loading)
    return code, seconds if load.calls > calls else None


def _score(args: argparse.Namespace, part: Prepared, seconds: float | None) -> Outcome | None:
    """Score an answers file; report why it can't be scored, and return None then."""
    benchmark, data, name = part.benchmark, Path(args.data), name_model(args)
    answers, upload = benchmark.answers_path(data, name), benchmark.upload_path(data, name)
    folder = data / benchmark.folder
    files = ScoreFiles(folder, folder / benchmark.question_file, answers, upload, args.limit)
    try:
        result = score(benchmark, files)
    except (ValueError, OSError) as error:
        report_error(f"{benchmark.title} is not scored: {error}")
        return None
    written = upload if upload is not None and upload.exists() else None
    return Outcome(benchmark, name, answers, len(part.questions), result, written, seconds)
