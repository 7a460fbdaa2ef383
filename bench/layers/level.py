"""What a level of the kernel benchmark is: a family of problems, those who solve them, and how right they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch

from bench.layers.contenders import Contender, Inputs, Outcome
from bench.layers.measure import cache_bytes
from bench.layers.problems import Shape

ALIGNMENT = 512
"""Bytes, of the beginning of every buffer, as an allocator would place them."""


@dataclass(frozen=True)
class Case:
    """One problem: a level, sizes and shares, and which of the level's losses or operators (its variant)."""

    level: str
    shape: Shape
    variant: str = ""

    @property
    def title(self) -> str:
        """Sizes and shares in a line."""
        head, dtype = self.shape.head, str(self.shape.head.dtype).removeprefix("torch.")
        names = [self.variant] if self.variant else []
        names += [f"N {self.shape.num_rows}"]
        names += [f"H {head.hidden_size} V {head.vocab_size} {dtype}"] if head.vocab_size else []
        return " ".join([*names, f"active {self.shape.active:g} live {self.shape.live:g}"])


class Level(Protocol):
    """A layer of the library."""

    @property
    def name(self) -> str: ...

    @property
    def variants(self) -> tuple[str, ...]:
        """Its losses or operators; one empty name if it has only one."""
        ...

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """All that can be measured, the floor first."""
        ...

    @property
    def has_backward(self) -> bool:
        """Whether its outcome is differentiated."""
        ...

    @property
    def is_short(self) -> bool:
        """Whether a step takes so little that it must be repeated often."""
        ...

    def problem(self, case: Case, device: torch.device, seed: int) -> Any:
        """Inputs to measure on."""
        ...

    def gate_problem(self, case: Case, device: torch.device, seed: int) -> Any:
        """Small inputs in the type of `case` that put every bound in force."""
        ...

    def truth(self, problem: Any, objective: str, max_rows: int | None) -> Any:
        """What the outcome must be, in float64; None if only the small inputs determine it."""
        ...

    def errors(self, outcome: Outcome, problem: Any, truth: Any) -> dict[str, float]:
        """Distances of an outcome, and of the gradients in the leaves, from the truth."""
        ...

    def least_work(self, contender: Contender, problem: Any, backward: bool) -> tuple[int, int]:
        """FLOPs and bytes that the contender's result needs at least; 0 FLOPs where bytes alone decide."""
        ...


def contenders_of(level: Level, variant: str) -> list[Contender]:
    """Those that have this loss or operator."""
    return [one for one in level.contenders if not one.variants or variant in one.variants]


class CountedInputs(Inputs, Protocol):
    """Inputs that know how many bytes an operator on them moves at least."""

    def least_bytes(self, backward: bool) -> int:
        """Bytes read and written, with the gradient if `backward`."""
        ...


class CopyFloor:
    """A copy of as many bytes as the level needs at least, half of them read: what memory alone allows.

    On CUDA it takes turns with pairs of buffers that exceed the second-level cache twice, as the others take turns with
    copies of their inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size = 0
        self._pairs: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def __call__(self, problem: CountedInputs) -> Outcome:
        """Copy; the buffers stay for the next call of the same size."""
        size = max(1, problem.least_bytes(torch.is_grad_enabled()) // 2)
        if size != self._size:
            self._size, self._pairs = size, cycle(self._make(size))
        source, target = next(self._pairs)
        target.copy_(source)
        return Outcome(None)

    def _make(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Sources and targets, uint8 [size], as many as exceed the cache twice together; one pair on the CPU."""
        stride = -(-size // ALIGNMENT) * ALIGNMENT
        count = cache_bytes(self._device) // stride + 1
        source = torch.zeros(count, stride, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return [(source[row, :size], target[row, :size]) for row in range(count)]
