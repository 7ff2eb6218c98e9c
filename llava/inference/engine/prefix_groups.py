"""Prefix sharing: find the system prefix of requests, and group requests by image prefix. Pure functions.

A prompt is cut into three parts. The system prefix, text before all images, is the same for the whole run. The image
prefix, up to the last image and the tokens that always follow it, is shared by the requests about the same images. The
suffix is a request's own. Attention is causal, so prefixes have the same keys and values in every prompt
(`llava/model/packed/masks.py`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import abc
from collections.abc import Callable, Iterable
from typing import TypeVar

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.packing import common_prefix_length
from llava.data.records import spliced_length
from llava.inference.engine.sequence import PrefixGroup, Request, Sequence

_Item = TypeVar("_Item")


def group_requests(
    requests: abc.Sequence[Request], system_prefix: abc.Sequence[int], patches: int, *, group_size: int
) -> list[PrefixGroup]:
    """Group requests by their images, whatever their order; the longest group comes first.

    Neighbours then have similar lengths, so that a prefill step needs little padding.

    Args:
        requests: all of the run, or of a window of it.
        system_prefix: ids that all these prompts start with, see `has_system_prefix`.
        patches: positions that an image takes, for the order; an estimate will do.
        group_size: most sequences of a group.
    """
    start = len(system_prefix)
    by_head: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Request]] = {}
    for request in requests:
        head = tuple(request.input_ids[start : max(start, _end_of_images(request.input_ids))])
        by_head.setdefault((request.images, head), []).append(request)
    extra = {has_images: _shared_after_images(by_head, start, has_images) for has_images in (False, True)}
    groups = []
    for (images, head), members in by_head.items():
        end = start + len(head) + extra[bool(images)]
        prefix_ids = list(members[0].input_ids[start:end])
        if not images:
            members = sorted(members, key=lambda request: len(request.input_ids))
        for part in even_parts(members, group_size):
            sequences = [Sequence(request, list(request.input_ids[end:])) for request in part]
            groups.append(PrefixGroup(images, prefix_ids, sequences))
    return sorted(groups, key=lambda group: _sort_key(group, patches), reverse=True)


def common_system_prefix(requests: Iterable[Request]) -> list[int]:
    """Return the ids that all prompts start with, up to their first image, and without the last position.

    Requests are read one by one and not kept in memory.
    """
    prefix: list[int] | None = None
    for request in requests:
        head = list(request.input_ids[: _longest_system_prefix(request)])
        prefix = head if prefix is None else prefix[: common_prefix_length([prefix, head])]
    return prefix or []


def has_system_prefix(request: Request, system_prefix: abc.Sequence[int]) -> bool:
    """Return whether a prompt can be computed after this system prefix."""
    length = len(system_prefix)
    return length <= _longest_system_prefix(request) and list(request.input_ids[:length]) == list(system_prefix)


def split_work(items: abc.Sequence[_Item], cost: Callable[[_Item], int], world_size: int) -> list[list[_Item]]:
    """Split work between distributed ranks, each item to the rank with the least so far; each rank keeps the order.

    Args:
        items: longest first.
        cost: work of an item, in positions.
        world_size: number of ranks.
    """
    shares: list[list[_Item]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for item in items:
        load, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + cost(item), rank))
    return shares


def group_length(group: PrefixGroup, patches: int) -> int:
    """Return the positions of a group's image prefix and suffixes, of which an image takes `patches`."""
    return sum(_sort_key(group, patches))


def even_parts(members: abc.Sequence[_Item], largest: int) -> list[abc.Sequence[_Item]]:
    """Cut into as few parts as their largest size allows, of sizes that differ by one at most."""
    count = -(-len(members) // largest)
    bounds = [index * len(members) // count for index in range(count + 1)]
    return [members[start:stop] for start, stop in itertools.pairwise(bounds)]


def _sort_key(group: PrefixGroup, patches: int) -> tuple[int, int]:
    return spliced_length(group.prefix_ids, patches), group.suffix_length


def _end_of_images(ids: abc.Sequence[int]) -> int:
    """Return the index after the last placeholder; 0 without one."""
    return next((index for index in range(len(ids), 0, -1) if ids[index - 1] == IMAGE_TOKEN_INDEX), 0)


def _longest_system_prefix(request: Request) -> int:
    """Return how long a prompt's system prefix may be: up to its first image, with something left to compute."""
    ids = request.input_ids
    first_image = next((index for index, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX), len(ids))
    return min(first_image, len(ids) - request.n_logits)


def _shared_after_images(
    by_head: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Request]], start: int, has_images: bool
) -> int:
    """Return how many ids after the last image every group's requests share; one number, for equally long prefixes."""
    lengths = []
    for (images, head), members in by_head.items():
        if bool(images) == has_images:
            end = start + len(head)
            lengths.append(common_prefix_length([request.input_ids[end : -request.n_logits] for request in members]))
    return min(lengths, default=0)
