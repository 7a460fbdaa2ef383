"""The engine's life in a run: it dies and the run goes on as if it had not, and it is freed however the run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spear_fast import trainer
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.errors import EngineError
from spear_fast.log.progress import Progress
from spear_fast.rollout.collector import Collector
from spear_fast.trainer import Trainer
from tests.end_to_end.test_training import run, without_times
from tests.toys import GUESS_RUN

QUICK = ["cold_start.steps=10", "checkpoint.every=1", "checkpoint.keep=9"]


class Mortal:
    """An engine that dies at its `last`-th request as a killed process does: from then on all but a load fails."""

    def __init__(self, engine: Any, last: int | None = None) -> None:
        self.inner, self.left, self.dead, self.closed = engine, last, False, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def alive(self) -> bool:
        return not self.dead

    async def generate(self, request: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.dead, self.left = True, None
        self._refuse()
        completion = await self.inner.generate(request)
        self._refuse()
        return completion

    def wake(self) -> None:
        self._refuse()
        self.inner.wake()

    def sleep(self) -> None:
        self._refuse()
        self.inner.sleep()

    def load_weights(self, named: Any, version: int) -> None:
        self.dead = False
        self.inner.load_weights(named, version)

    def close(self) -> None:
        self.closed += 1
        self.inner.close()

    def _refuse(self) -> None:
        if self.dead:
            raise EngineError("the engine died")


def config_of(out: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"out={out}", *QUICK, *overrides], GUESS_RUN)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Mortal]:
    """The engines that trainers make from now on; each lives for as many requests as the test's parameter says."""
    made: list[Mortal] = []
    make, last = trainer.make_engine, getattr(request, "param", None)
    monkeypatch.setattr(trainer, "make_engine", lambda *args: made.append(Mortal(make(*args), last)) or made[-1])
    return made


@pytest.mark.parametrize("engines", [10, 64 + 40], indirect=True)
def test_an_engine_that_dies_leaves_no_trace_in_the_numbers(tmp_path, monkeypatch, engines):
    """Once in the first evaluation, of 64 requests, and once in the second step's rollout, of 32 each."""
    lines, _ = run(config_of(tmp_path, "steps=2", "name=mortal"))
    assert engines[0].left is None, "the engine must have died"
    monkeypatch.undo()
    whole, _ = run(config_of(tmp_path, "steps=2", "name=whole"))
    assert without_times(lines) == without_times(whole)


@pytest.mark.parametrize("engines", [64 + 20, 64 + 60], indirect=True)
def test_a_dead_engine_loses_no_prompt_of_partial_rollouts(tmp_path, monkeypatch, engines):
    config = config_of(tmp_path, "steps=4", "rollout.mode=partial", "rollout.deterministic=false")
    handed_out: list[int] = []
    log = Trainer._log
    monkeypatch.setattr(
        Trainer, "_log", lambda self, m, groups: (handed_out.extend(g.task.index for g in groups), log(self, m, groups))
    )
    whole_run = Trainer(config, Progress(4, "guess"))
    try:
        whole_run.run()
        unfinished = [task.index for task in whole_run.collector.pending_tasks()]
        fresh = type(whole_run.prompts)(whole_run.tasks, config.seed)
        expected = [task.index for task in fresh.next(whole_run.prompts.state_dict()["consumed"])]
    finally:
        whole_run.close()
    assert engines[0].left is None, "the engine must have died"
    assert len(handed_out) == 4 * config.rollout.prompts_per_step
    assert sorted(handed_out + unfinished) == sorted(expected)


def test_trajectories_end_before_their_engine_and_a_failed_start_frees_it(tmp_path, monkeypatch, engines):
    closed_first: list[bool] = []
    close = Collector.close
    monkeypatch.setattr(Collector, "close", lambda self: (closed_first.append(not engines[-1].closed), close(self)))
    Trainer(config_of(tmp_path, "name=whole"), Progress(1, "whole")).close()
    assert engines[-1].closed == 1 and closed_first == [True]

    def fail(*_: object) -> None:
        raise EngineError("no updater")

    monkeypatch.setattr(trainer, "make_updater", fail)
    with pytest.raises(EngineError, match="no updater"):
        Trainer(config_of(tmp_path, "name=broken"), Progress(1, "broken"))
    assert engines[-1].closed == 1 and closed_first == [True, True]
