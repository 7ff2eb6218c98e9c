"""GPU utilisation of a run and its longest idle gaps, from PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType


class Span(NamedTuple):
    """A kernel or copy on the device, in seconds since the profiler's start."""

    start: float
    end: float
    name: str


class Gap(NamedTuple):
    """A time in which the device was idle."""

    start: float
    seconds: float
    before: str
    after: str


class DeviceShare(NamedTuple):
    """Times of the device in a run.

    Attributes:
        busy: seconds in which it ran anything; what ran at the same time counts once.
        first: seconds until it began.
        last: seconds until it was done.
        gaps: in between, the longest first.
    """

    busy: float
    first: float
    last: float
    gaps: list[Gap]


def device_spans(profiler: torch.profiler.profile) -> list[Span]:
    """Return kernels and copies on the GPU, without the profiler's own marks."""
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return [
        Span(event.time_range.start / 1e6, event.time_range.end / 1e6, event.name)
        for event in events
        if not event.is_user_annotation and not event.name.startswith(("ProfilerStep", "Command Buffer", "Activity"))
    ]


def device_share(spans: Sequence[Span]) -> DeviceShare:
    """Return the device's busy time and gaps; zeros if nothing ran on it."""
    if not spans:
        return DeviceShare(0.0, 0.0, 0.0, [])
    ordered = sorted(spans)
    busy, reached, latest = 0.0, ordered[0].start, "start"
    gaps = []
    for span in ordered:
        if span.start > reached:
            gaps.append(Gap(reached, span.start - reached, latest, span.name))
        if span.end > reached:
            busy += span.end - max(span.start, reached)
            reached, latest = span.end, span.name
    return DeviceShare(busy, ordered[0].start, reached, sorted(gaps, key=lambda gap: gap.seconds, reverse=True))


def as_lines(share: DeviceShare, wall: float, count: int = 12, width: int = 44) -> str:
    """Return what a reader wants to see: the share, the ends, and the longest gaps.

    Args:
        share: of a run.
        wall: seconds of the run.
        count: of gaps.
        width: of a kernel's name.
    """
    rest = [gap.seconds for gap in share.gaps]
    lines = [
        f"device busy {share.busy:.3f} of {wall:.3f} s ({share.busy / wall:.1%}); idle {share.first:.3f} s before, "
        f"{max(0.0, wall - share.last):.3f} s after, {sum(rest):.3f} s in {len(rest)} gaps, "
        f"{sum(seconds for seconds in rest if seconds >= 1e-3):.3f} s of it in gaps of 1 ms and more"
    ]
    lines += [
        f"  {1e3 * gap.seconds:8.2f} ms at {gap.start:7.3f} s: {gap.before[:width]} .. {gap.after[:width]}"
        for gap in share.gaps[:count]
    ]
    return "\n".join(lines)
