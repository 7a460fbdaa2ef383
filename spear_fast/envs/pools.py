"""Disjoint train, eval and demo problems drawn from one generator, each by its index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from spear_fast.errors import ConfigError

from .splits import Split, check_index, check_split, split_of

MAX_DRAWS = 2000
"""Draws in a row without a usable problem after which a split counts as exhausted."""

Problem = TypeVar("Problem")


class Pools(Generic[Problem]):
    """Problems by split and index.

    Train and demo problems are made when asked for: problem i is the first of its own stream of draws that falls into
    the split, so it depends on neither the size of the pool nor the order of requests, and may repeat. Eval problems
    are all different and are collected at the start.
    """

    def __init__(
        self,
        name: str,
        sizes: Mapping[str, int],
        generate: Callable[[Split, int], Problem | None],
        key: Callable[[Problem], str],
        identity: Callable[[Problem], str],
    ) -> None:
        """`generate(split, draw)` must depend on its arguments alone; None marks a draw that is of no use.

        Problems with equal `key` share a split, eval problems differ in `identity`. Raises ConfigError if a split
        cannot be filled.
        """
        self._name = name
        self._sizes = dict(sizes)
        self._generate = generate
        self._key = key
        self._identity = identity
        self._eval = self._draw_eval()
        drawn_late: tuple[Split, ...] = ("train", "demo")
        for split in drawn_late:
            if self._sizes[split]:
                self._draw(split, 0)

    def size(self, split: str) -> int:
        """Return the number of problems in `split`. Raises TaskError for an unknown split."""
        check_split(self._name, split, self._sizes)
        return self._sizes[split]

    def get(self, split: Split, index: int) -> Problem:
        """Return problem `index` of `split`. Raises TaskError if there is none."""
        check_index(self._name, split, index, self._sizes)
        return self._eval[index] if split == "eval" else self._draw(split, index)

    def _try(self, split: Split, draw: int) -> Problem | None:
        problem = self._generate(split, draw)
        return problem if problem is not None and split_of(self._key(problem)) == split else None

    def _draw(self, split: Split, index: int) -> Problem:
        for draw in range(index * MAX_DRAWS, (index + 1) * MAX_DRAWS):
            problem = self._try(split, draw)
            if problem is not None:
                return problem
        raise ConfigError(
            f"task {self._name!r}: task.params leaves too few different problems for split {split!r}; allow larger ones"
        )

    def _draw_eval(self) -> list[Problem]:
        found: dict[str, Problem] = {}
        draw = fruitless = 0
        while len(found) < self._sizes["eval"]:
            problem = self._try("eval", draw)
            known = len(found)
            if problem is not None:
                found.setdefault(self._identity(problem), problem)
            fruitless = 0 if len(found) > known else fruitless + 1
            if fruitless == MAX_DRAWS:
                raise ConfigError(
                    f"task.params.num_eval={self._sizes['eval']}: only {len(found)} different problems were found; "
                    f"lower it or allow larger problems"
                )
            draw += 1
        return list(found.values())
