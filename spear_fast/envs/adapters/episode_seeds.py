"""Seeds of environments that draw their task from a seed: disjoint ranges for the splits."""

from __future__ import annotations

from spear_fast.seeds import derive_seed

RANGE = 1 << 29
"""Seeds of one split. All seeds are below 2^31, which every environment takes."""

_FIRST = {"train": 0, "eval": RANGE, "demo": 2 * RANGE}


def episode_seed(split: str, index: int, run_seed: int) -> int:
    """Return the seed of task `index` (below `RANGE`) of `split`.

    The run's seed moves the training tasks only, so what is held out in one run is held out in all. Different seeds
    may still give equal tasks: that is up to the environment.
    """
    offset = derive_seed(run_seed, "train") if split == "train" else 0
    return _FIRST[split] + (offset + index) % RANGE
