"""The numbers of one training step, gathered from all rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter


class StepMetrics:
    """Collects `room/what_unit` metrics of one step and the seconds spent in its phases.

    Example: `metrics = StepMetrics(3)`; `with metrics.phase("rollout"): ...`; `metrics.add({"reward/mean": 0.4})`;
    `metrics.values()` gives `{"time_s": 2.1, "time/rollout_s": 1.9, "reward/mean": 0.4}`.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._started = perf_counter()
        self._phases: dict[str, float] = {}
        self._values: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take over a room's numbers (floats, or anything `float()` takes).

        Raises ValueError if a name was already given in this step: one of two rooms would be overwritten.
        """
        twice = sorted(name for name in values if name in self._values or name in ("step", "time_s"))
        if twice:
            raise ValueError(
                f"step {self.step}: metrics {twice} were already reported; rename them in one of the rooms"
            )
        self._values.update({name: float(value) for name, value in values.items()})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the enclosed wall time as `time/<name>_s`; phases of the same name add up."""
        started = perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + perf_counter() - started

    def values(self) -> dict[str, float]:
        """Return all numbers under their full names; `time_s` is the wall time since this object was made.

        Raises ValueError if a room reported a name that a phase also has.
        """
        phases = {f"time/{name}_s": seconds for name, seconds in self._phases.items()}
        twice = sorted(phases.keys() & self._values.keys())
        if twice:
            raise ValueError(f"step {self.step}: metrics {twice} are also names of phases; rename them in their room")
        return {"time_s": perf_counter() - self._started, **phases, **self._values}
