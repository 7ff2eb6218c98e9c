"""Train/validation split by image: split by row, the images of training would come again in validation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TypeVar

Key = TypeVar("Key", int, str)


def held_out(keys: Collection[Key], share: float, seed: int) -> set[Key]:
    """Choose a share of keys by rank of a hash, whatever their order and the Python version.

    Args:
        keys: at least two different ones.
        share: of the keys, 0 < share < 1; at least one key is chosen and one left.
        seed: another seed, another choice.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the validation share must lie between 0 and 1, not {share}")
    unique = set(keys)
    count = min(max(round(share * len(unique)), 1), len(unique) - 1)
    return set(ranked(unique, seed)[:count])


def ranked(keys: Collection[Key], seed: int) -> list[Key]:
    """Shuffle keys by a hash of seed and key: always the same order for the same seed."""
    return sorted(keys, key=lambda key: (hashlib.sha256(f"{seed}:{key}".encode()).digest(), key))


def split_rows(names: Sequence[Sequence[str]], share: float, seed: int) -> list[bool]:
    """Return which rows go to the validation side, so that no name is on both sides.

    Args:
        names: of each row, at least one: its images', or what identifies a row without any.
        share: of the groups of rows tied together by names, 0 < share < 1; at least one group on each side.
        seed: another seed, another split.

    Raises:
        ValueError: if the share is not between 0 and 1, or all rows are one group.
    """
    groups = tie_rows(names)
    if len(set(groups)) < 2:
        raise ValueError("rows of one image can't be split; pass rows of their own with --eval_data_path")
    chosen = held_out(groups, share, seed)
    return [group in chosen for group in groups]


def tie_rows(names: Sequence[Sequence[str]]) -> list[str]:
    """Group rows that share a name, directly or through others (union-find); a group is called by its first name."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for row in names:
        for name in row:
            low, high = sorted((find(row[0]), find(name)))
            parent[high] = low
    return [find(row[0]) for row in names]
