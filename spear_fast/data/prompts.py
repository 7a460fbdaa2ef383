"""Which tasks come next: a seeded order over the training tasks, and the cursor that a resume continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spear_fast.errors import TaskError
from spear_fast.seeds import derive_seed
from spear_fast.types import Task

if TYPE_CHECKING:
    from spear_fast.envs.base import TaskSet


class PromptStream:
    """Endless tasks of the training split, each epoch in a fresh seeded order. No task is skipped or repeated."""

    def __init__(self, tasks: TaskSet, seed: int) -> None:
        """
        Args:
            tasks: Source of the training split.
            seed: Of the run.

        Raises:
            TaskError: The training split is empty.
        """
        self._size = tasks.size("train")
        if self._size < 1:
            raise TaskError(f"task set {tasks.name!r} has no training tasks; check task.params")
        self._name = tasks.name
        self._seed = seed
        self._order_of: tuple[int, np.ndarray] | None = None
        self.consumed = 0
        """Tasks handed out so far."""

    def next(self, count: int) -> list[Task]:
        """Return the next `count` tasks and move the cursor."""
        tasks = [self._task(self.consumed + offset) for offset in range(count)]
        self.consumed += count
        return tasks

    def state_dict(self) -> dict[str, int]:
        """Return the cursor."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the tasks consumed before."""
        self.consumed = int(state["consumed"])

    def _task(self, position: int) -> Task:
        epoch, offset = divmod(position, self._size)
        if self._order_of is None or self._order_of[0] != epoch:
            generator = np.random.default_rng(derive_seed(self._seed, "epoch", epoch))
            self._order_of = (epoch, generator.permutation(self._size))
        return make_task(self._name, "train", int(self._order_of[1][offset]), self._seed)


def make_task(name: str, split: str, index: int, seed: int) -> Task:
    """Return task `index` of a split with its own seed."""
    return Task(name, split, index, derive_seed(seed, name, split, index))


def eval_tasks(tasks: TaskSet, count: int, seed: int) -> list[Task]:
    """Return the first `count` held-out tasks.

    Raises:
        TaskError: The task set has no held-out tasks.
    """
    size = tasks.size("eval")
    if size < 1:
        raise TaskError(f"task set {tasks.name!r} has no held-out tasks (split 'eval'); check task.params")
    return [make_task(tasks.name, "eval", index, seed) for index in range(min(count, size))]
