"""The order of training tasks: every task once per epoch, and a resumed cursor neither skips nor repeats."""

from __future__ import annotations

import pytest

from spear_fast.data.prompts import PromptStream, eval_tasks
from spear_fast.errors import TaskError
from tests.toys import GuessTasks


class Empty(GuessTasks):
    def size(self, split: str) -> int:
        return 0


@pytest.fixture
def tasks() -> GuessTasks:
    return GuessTasks(None, 0)


def test_every_epoch_holds_each_task_once_in_another_order(tasks):
    stream = PromptStream(tasks, seed=1)
    first = [task.index for task in stream.next(64)]
    second = [task.index for task in stream.next(64)]
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second


def test_resumed_cursor_continues_within_and_across_epochs(tasks):
    whole = PromptStream(tasks, seed=1).next(150)
    stream = PromptStream(tasks, seed=1)
    parts = stream.next(50)
    resumed = PromptStream(tasks, seed=1)
    resumed.load_state_dict(stream.state_dict())
    assert parts + resumed.next(100) == whole


def test_seeds_differ_between_runs_and_tasks(tasks):
    one, other = PromptStream(tasks, seed=1).next(64), PromptStream(tasks, seed=2).next(64)
    assert len({task.seed for task in one + other}) == 128


def test_eval_tasks_are_the_first_of_their_split(tasks):
    assert [task.index for task in eval_tasks(tasks, 5, seed=0)] == [0, 1, 2, 3, 4]
    assert len(eval_tasks(tasks, 1000, seed=0)) == 64


def test_empty_splits_are_refused():
    with pytest.raises(TaskError, match="no training tasks"):
        PromptStream(Empty(None, 0), seed=0)
    with pytest.raises(TaskError, match="no held-out tasks"):
        eval_tasks(Empty(None, 0), 4, seed=0)
