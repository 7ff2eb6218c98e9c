"""Plan of a batch run: which questions share a prefix, and in which order their groups are computed. Pure functions.

A prompt is cut into three parts. The stem, text in front of all images, is the same for the whole run. The trunk, up to
the last image and what always follows it, belongs to a group of questions about the same pictures. The branch is a
question's own. `llava/model/tree_attention.py` says why a branch may share the two others.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llava.constants import IMAGE_TOKEN_INDEX

MAX_BRANCHES = 32
"""Of a group; more questions about a picture become several groups, whose prefix is then computed several times."""


class Ask(NamedTuple):
    """One prompt of a run.

    Attributes:
        key: says whose prompt it is.
        ids: prompt with `IMAGE_TOKEN_INDEX` per image; where a given answer is scored, followed by that answer.
        images: file names, in the order of the placeholders.
        targets: ids that are scored: what the last `len(targets)` of `ids` should be followed by. Empty = generate.
        choice: number of the given answer.
    """

    key: int
    ids: Sequence[int]
    images: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    choice: int = 0

    @property
    def n_kept(self) -> int:
        """Last positions whose logits are needed."""
        return max(1, len(self.targets))


@dataclass(eq=False)
class Branch:
    """A question of a group, and its answer as far as it has come.

    Attributes:
        ask: the prompt.
        ids: what of the prompt stands behind the trunk.
        generated: ids of the answer so far.
        logprobs: natural logarithm of the probability of each of them, or of each target.
        runner_up: the likeliest other first token and its logprob.
        n_coming: tokens of the answer that are computed, but not here yet.
    """

    ask: Ask
    ids: list[int]
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    runner_up: tuple[int, float] | None = None
    n_coming: int = 0

    @property
    def tokens(self) -> list[int]:
        """What is computed when the branch is: question and answer so far."""
        return self.ids + self.generated


@dataclass(eq=False)
class Group:
    """Questions behind one trunk.

    Attributes:
        images: file names.
        trunk_ids: ids behind the stem, with placeholders.
        branches: questions that are not finished.
    """

    images: tuple[str, ...]
    trunk_ids: list[int]
    branches: list[Branch]

    @property
    def branch_length(self) -> int:
        """Positions of all branches together."""
        return sum(len(branch.tokens) for branch in self.branches)


class Plan(NamedTuple):
    """Stem of a run and its groups, longest first, so that neighbours have similar lengths."""

    stem_ids: list[int]
    groups: list[Group]


def plan_groups(asks: Sequence[Ask], patches: int, *, max_branches: int = MAX_BRANCHES) -> Plan:
    """Group prompts by their pictures, whatever their order.

    Args:
        asks: all prompts of the run.
        patches: positions that a picture takes, for the order; an estimate will do.
        max_branches: of a group.
    """
    if not asks:
        return Plan([], [])
    stem = _common_length([ask.ids for ask in asks], min(map(_stem_limit, asks)))
    by_trunk: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Ask]] = {}
    for ask in asks:
        head = tuple(ask.ids[stem : max(stem, _image_end(ask.ids))])
        by_trunk.setdefault((ask.images, head), []).append(ask)
    extra = {has_images: _extra_length(by_trunk, stem, has_images=has_images) for has_images in (False, True)}
    groups = []
    for (images, head), members in by_trunk.items():
        trunk_end = stem + len(head) + extra[bool(images)]
        trunk_ids = list(members[0].ids[stem:trunk_end])
        if not images:
            members = sorted(members, key=lambda ask: len(ask.ids))
        for part in _even_parts(members, max_branches):
            groups.append(Group(images, trunk_ids, [Branch(ask, list(ask.ids[trunk_end:])) for ask in part]))
    return Plan(list(asks[0].ids[:stem]), sorted(groups, key=lambda group: _size(group, patches), reverse=True))


def deal_groups(groups: Sequence[Group], patches: int, parts: int) -> list[list[Group]]:
    """Share groups between processes so that each has the same amount of work; each part keeps the order.

    Args:
        groups: of a plan, longest first.
        patches: positions that a picture takes.
        parts: number of processes.
    """
    shares: list[list[Group]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for group in groups:
        load, part = heapq.heappop(loads)
        shares[part].append(group)
        heapq.heappush(loads, (load + sum(_size(group, patches)), part))
    return shares


def spliced_length(ids: Iterable[int], patches: Callable[[], int]) -> int:
    """Return the positions of ids whose placeholders take `patches()` each, asked for image by image."""
    return sum(patches() if token == IMAGE_TOKEN_INDEX else 1 for token in ids)


def _size(group: Group, patches: int) -> tuple[int, int]:
    return spliced_length(group.trunk_ids, lambda: patches), group.branch_length


def _image_end(ids: Sequence[int]) -> int:
    """Index behind the last placeholder; 0 without one."""
    return next((index for index in range(len(ids), 0, -1) if ids[index - 1] == IMAGE_TOKEN_INDEX), 0)


def _stem_limit(ask: Ask) -> int:
    """Longest stem of a prompt: up to its first image, with something left to compute."""
    first_image = next((index for index, token in enumerate(ask.ids) if token == IMAGE_TOKEN_INDEX), len(ask.ids))
    return min(first_image, len(ask.ids) - ask.n_kept)


def _common_length(rows: Sequence[Sequence[int]], limit: int) -> int:
    """Length of the longest common beginning, at most `limit`."""
    lowest, highest = min(rows), max(rows)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lowest[:limit], highest[:limit], strict=False))
    return sum(1 for _ in shared)


def _extra_length(
    by_trunk: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Ask]], stem: int, *, has_images: bool
) -> int:
    """Ids behind the last image that every group's questions share; one number, so that trunks are equally long."""
    lengths = [
        _common_length([ask.ids[start:] for ask in members], min(len(ask.ids) - ask.n_kept - start for ask in members))
        for (images, head), members in by_trunk.items()
        if bool(images) == has_images
        for start in [stem + len(head)]
    ]
    return min(lengths, default=0)


def _even_parts(members: Sequence[Ask], largest: int) -> list[Sequence[Ask]]:
    count = -(-len(members) // largest)
    bounds = [index * len(members) // count for index in range(count + 1)]
    return [members[start:stop] for start, stop in itertools.pairwise(bounds)]
