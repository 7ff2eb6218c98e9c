"""Continuous-batching engine: prefills requests that share an image prefix, decodes all running sequences in one step.

Laws: an answer depends on its own prompt alone, whatever else is in the batch; every sequence is yielded once.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llava.inference.engine.device_to_host import HostCopy
from llava.inference.engine.limits import Limits
from llava.inference.engine.model_runner import ModelRunner
from llava.inference.engine.scheduler import Scheduler
from llava.inference.engine.sequence import PrefixGroup, RequestError, Sequence
from llava.inference.engine.waiting import WaitingQueue
from llava.inference.session import Sampling, Session


class Engine:
    """Answers prefix groups.

    Args:
        session: model and template; `supports_ragged(session.model)`.
        sampling: how tokens are chosen, without beams.
        system_prefix: ids that all prompts start with.
        with_scores: note the logprob of each token, and the first one's runner-up.
        limits: sizes; None = what suits the device.
        compiled: as in `RaggedLlama`.
        graphed: capture decode steps as CUDA graphs.
    """

    def __init__(
        self,
        session: Session,
        sampling: Sampling,
        system_prefix: abc.Sequence[int],
        *,
        with_scores: bool = False,
        limits: Limits | None = None,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        self._session = session
        self._limits = limits or Limits.suiting(session.model.device, sampling.max_new_tokens)
        self._runner = ModelRunner(
            session.model, sampling, system_prefix, with_scores=with_scores, compiled=compiled, graphed=graphed
        )

    def run(self, groups: Iterable[PrefixGroup], images: Iterator[list[Tensor] | RequestError]) -> Iterator[Sequence]:
        """Yield every sequence once, as soon as it is finished or has failed.

        Args:
            groups: longest first; may be a generator.
            images: pixels of each group's images or why they can't be read, in the same order.

        Raises:
            torch.OutOfMemoryError: if a single sequence does not fit.
        """
        session, runner, limits = self._session, self._runner, self._limits
        waiting = WaitingQueue(groups, images, session, runner, limits)
        scheduler = Scheduler(waiting, session, runner, limits)
        in_flight: deque[HostCopy] = deque()
        while scheduler:
            batch = None
            try:
                if batch := scheduler.schedule():
                    in_flight.append(runner.run(batch))
                    waiting.encode_ahead()
            except torch.OutOfMemoryError as error:
                scheduler.preempt_all(error)
                in_flight.clear()
            yield from scheduler.take_finished()  # the caller works on them while the device computes
            if in_flight and (len(in_flight) > limits.steps_in_flight or not batch):
                scheduler.update(in_flight.popleft().wait())
