"""Which split a problem belongs to, decided by a hash of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from spear_fast.errors import TaskError

Split = Literal["train", "eval", "demo"]
SHARES: dict[Split, float] = {"train": 0.6, "eval": 0.2, "demo": 0.2}
"""Share of all possible problems that belongs to each split."""


def unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone, uniform over texts."""
    # 53 bits, the precision of a float: more could round up to 1.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_of(text: str) -> Split:
    """Return the one split that the problem written as `text` belongs to.

    The run's seed has no part in it: a problem held out in one run is held out in all, so a model trained under one
    seed can be evaluated under another.
    """
    position = unit_hash(text)
    if position < SHARES["train"]:
        return "train"
    return "eval" if position < SHARES["train"] + SHARES["eval"] else "demo"


def check_split(name: str, split: str, sizes: Mapping[str, int]) -> None:
    """Raise TaskError unless task set `name`, with these `sizes`, has `split`."""
    if split not in sizes:
        raise TaskError(f"task set {name!r} has no split {split!r}; it has {', '.join(sizes)}")


def check_index(name: str, split: str, index: int, sizes: Mapping[str, int]) -> None:
    """Raise TaskError unless `split` exists and holds a task `index`."""
    check_split(name, split, sizes)
    if not 0 <= index < sizes[split]:
        raise TaskError(f"task {index} is outside split {split!r} of task set {name!r}, which has {sizes[split]} tasks")
