"""StepMetrics: names stay unique, phases add up."""

from __future__ import annotations

import pytest

from spear_fast.log import metrics as metrics_module
from spear_fast.log.metrics import StepMetrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test moves `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(metrics_module, "perf_counter", lambda: now[0])
    return now


def test_rooms_are_gathered_under_their_names() -> None:
    metrics = StepMetrics(4)
    metrics.add({"reward/mean": 0.5})
    metrics.add({"replay/size": 7})
    values = metrics.values()
    assert values["reward/mean"] == 0.5
    assert values["replay/size"] == 7.0
    assert type(values["replay/size"]) is float


@pytest.mark.parametrize("name", ["reward/mean", "step", "time_s"])
def test_a_name_given_twice_is_an_error(name: str) -> None:
    metrics = StepMetrics(4)
    metrics.add({"reward/mean": 0.5})
    with pytest.raises(ValueError, match=rf"step 4.*{name}"):
        metrics.add({name: 1.0})


def test_a_room_cannot_take_the_name_of_a_phase() -> None:
    metrics = StepMetrics(4)
    with metrics.phase("rollout"):
        pass
    metrics.add({"time/rollout_s": 1.0})
    with pytest.raises(ValueError, match="time/rollout_s"):
        metrics.values()


def test_phases_of_one_name_add_up(clock: list[float]) -> None:
    metrics = StepMetrics(1)
    for seconds in (2.0, 3.0):
        with metrics.phase("update"):
            clock[0] += seconds
    clock[0] += 1.0
    assert metrics.values() == {"time_s": 6.0, "time/update_s": 5.0}


def test_a_phase_that_fails_is_still_measured(clock: list[float]) -> None:
    metrics = StepMetrics(1)
    with pytest.raises(RuntimeError), metrics.phase("rollout"):
        clock[0] += 2.0
        raise RuntimeError
    assert metrics.values()["time/rollout_s"] == 2.0
