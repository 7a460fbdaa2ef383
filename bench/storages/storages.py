"""Replay storages that are compared: ours, padded copies of whole batches, and a list of dicts."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bench.storages.load import Step
from spear_fast.replay import ReplayMemory

BASELINE = 10_240
"""Groups in the reward baseline, as in the published runs."""
NEVER_RIPE = 1e9


class Storage(Protocol):
    """Keeps trajectories that are younger than some steps and draws among those worth repeating."""

    def prepare(self, step: Step) -> Any:
        """The step in the form that the trainer of this storage holds it in; not part of the push."""
        ...

    def push(self, prepared: Any) -> None:
        """Store a step."""
        ...

    def scan(self, version: int) -> tuple[int, int]:
        """Drop what is stale at `version` and recalibrate; return how many are stored, and how many eligible."""
        ...

    def draw(self, version: int, seed: int) -> int:
        """Draw without replacement, empty the storage and return how many trajectories came out."""
        ...

    def snapshot(self) -> Any:
        """What `restore` needs to bring the present content back after a draw; not measured."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Bring it back, ripe."""
        ...


@runtime_checkable
class Savable(Protocol):
    """A storage that a checkpoint can hold."""

    def save(self, file: Path) -> None:
        """Write everything to a file."""
        ...

    def load(self, file: Path) -> None:
        """Replace everything by what `save` wrote, ripe."""
        ...


class Ours:
    """`spear_fast.replay.ReplayMemory`."""

    def __init__(self, draw: int, tolerate_steps: int) -> None:
        self._draw, self._tolerate_steps = draw, tolerate_steps
        self._memory = self._make(NEVER_RIPE)

    def _make(self, ripe_factor: float) -> ReplayMemory:
        return ReplayMemory(
            buffer_size=self._draw,
            baseline_size=BASELINE,
            tolerate_steps=self._tolerate_steps,
            ripe_factor=ripe_factor,
            require_tool_call=True,
            recalibrate="p50",
            decay_weight=1.0,
            std_norm=False,
        )

    def prepare(self, step: Step) -> Step:
        """Nothing to do."""
        return step

    def push(self, prepared: Step) -> None:
        """See `Storage`; the rows' admission and the groups' statistics are part of it."""
        self._memory.offer(prepared.groups, prepared.rows)

    def scan(self, version: int) -> tuple[int, int]:
        """See `Storage`."""
        rows, stats = self._memory.draw(version, 0)
        assert rows is None, "the storage must not be ripe while it is filled"
        return int(stats["replay/size"]), int(stats["replay/eligible"])

    def draw(self, version: int, seed: int) -> int:
        """See `Storage`; nothing before `restore` or `load`, which make it ripe."""
        rows, _ = self._memory.draw(version, seed)
        return len(rows or [])

    def snapshot(self) -> dict[str, np.ndarray]:
        """See `Storage`."""
        return self._memory.state_dict()

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """See `Storage`."""
        self._memory = self._make(0.0)
        self._memory.load_state_dict(snapshot)

    def save(self, file: Path) -> None:
        """As a checkpoint does."""
        np.savez(file, **cast("dict[str, Any]", self._memory.state_dict()))

    def load(self, file: Path) -> None:
        """As a resumed run does."""
        with np.load(file) as arrays:
            self.restore(dict(arrays))


class PaddedCopies:
    """Deep copies of padded batches, [rows, longest] each, as trainers keep them that pad: 24 bytes a place."""

    def __init__(self, draw: int, tolerate_steps: int, longest: int) -> None:
        self._draw, self._tolerate_steps, self._longest = draw, tolerate_steps, longest
        self._batches: list[dict[str, Tensor]] = []
        self._means: deque[float] = deque(maxlen=BASELINE)

    def prepare(self, step: Step) -> tuple[dict[str, Tensor], list[float]]:
        """Pad: such a trainer holds its batches so anyway."""
        shape = (len(step.rows), self._longest)
        batch = {
            "tokens": torch.zeros(shape, dtype=torch.int64),
            "action_mask": torch.zeros(shape, dtype=torch.int64),
            "old_logp": torch.zeros(shape),
            "advantages": torch.zeros(shape),
        }
        lengths = torch.tensor([row.num_tokens for row in step.rows])
        filled = torch.arange(self._longest) < lengths[:, None]  # [R, longest]
        for name, tensor in batch.items():
            values = np.concatenate([getattr(row, name) for row in step.rows])
            tensor[filled] = torch.from_numpy(values).to(tensor.dtype)
        for name, dtype in (("reward", torch.float64), ("version", torch.int64), ("uid", torch.int64)):
            batch[name] = torch.tensor([getattr(row, name) for row in step.rows], dtype=dtype)
        return batch, _group_means(step)

    def push(self, prepared: tuple[dict[str, Tensor], list[float]]) -> None:
        """See `Storage`."""
        batch, means = prepared
        mask = batch["action_mask"]
        advantage = (batch["advantages"] * mask).sum(1) / mask.sum(1)
        self._batches.append(copy.deepcopy({name: tensor[advantage > 0] for name, tensor in batch.items()}))
        self._means.extend(means)

    def scan(self, version: int) -> tuple[int, int]:
        """See `Storage`."""
        kept = []
        for batch in self._batches:
            fresh = version - batch["version"] <= self._tolerate_steps
            kept.append(batch if bool(fresh.all()) else {name: tensor[fresh] for name, tensor in batch.items()})
        self._batches = [batch for batch in kept if len(batch["uid"])]
        return sum(len(batch["uid"]) for batch in self._batches), len(self._eligible())

    def _eligible(self) -> Tensor:
        rewards = torch.cat([batch["reward"] for batch in self._batches])
        return torch.nonzero(rewards - float(np.median(self._means)) > 0)[:, 0]

    def draw(self, version: int, seed: int) -> int:
        """See `Storage`."""
        self.scan(version)
        eligible = self._eligible()
        chosen = eligible[torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))[: self._draw]]
        names = list(self._batches[0])
        drawn = {name: torch.cat([batch[name] for batch in self._batches])[chosen] for name in names}
        median = float(np.median(self._means))
        drawn["advantages"] = (drawn["reward"][:, None] - median).float() * drawn["action_mask"]
        self._batches = []
        return len(drawn["uid"])

    def snapshot(self) -> list[dict[str, Tensor]]:
        """See `Storage`; a draw leaves the batches as they are."""
        return self._batches

    def restore(self, snapshot: list[dict[str, Tensor]]) -> None:
        """See `Storage`."""
        self._batches = snapshot

    def save(self, file: Path) -> None:
        """See `Savable`."""
        torch.save((self._batches, list(self._means)), file)

    def load(self, file: Path) -> None:
        """See `Savable`."""
        batches, means = torch.load(file, weights_only=True)
        self._batches, self._means = batches, deque(means, maxlen=BASELINE)


class ListOfDicts:
    """One dict of small arrays per trajectory; nothing that a checkpoint could hold without a pickle."""

    def __init__(self, draw: int, tolerate_steps: int) -> None:
        self._draw, self._tolerate_steps = draw, tolerate_steps
        self._rows: list[dict[str, Any]] = []
        self._means: deque[float] = deque(maxlen=BASELINE)

    def prepare(self, step: Step) -> tuple[Step, list[float]]:
        """Nothing to do but the groups' means."""
        return step, _group_means(step)

    def push(self, prepared: tuple[Step, list[float]]) -> None:
        """See `Storage`."""
        step, means = prepared
        for row in step.rows:
            if row.advantages[row.action_mask].mean() > 0:
                arrays = {
                    name: getattr(row, name).copy() for name in ("tokens", "action_mask", "old_logp", "advantages")
                }
                self._rows.append({**arrays, "reward": row.reward, "version": row.version, "uid": row.uid})
        self._means.extend(means)

    def scan(self, version: int) -> tuple[int, int]:
        """See `Storage`."""
        self._rows = [row for row in self._rows if version - row["version"] <= self._tolerate_steps]
        return len(self._rows), len(self._eligible())

    def _eligible(self) -> list[tuple[dict[str, Any], float]]:
        median = float(np.median(self._means))
        return [(row, row["reward"] - median) for row in self._rows if row["reward"] - median > 0]

    def draw(self, version: int, seed: int) -> int:
        """See `Storage`."""
        self.scan(version)
        eligible = self._eligible()
        drawn = random.Random(seed).sample(eligible, min(self._draw, len(eligible)))
        for row, advantage in drawn:
            row["advantages"] = np.where(row["action_mask"], np.float32(advantage), np.float32(0))
        self._rows = []
        return len(drawn)

    def snapshot(self) -> list[dict[str, Any]]:
        """See `Storage`; a draw changes advantages only."""
        return self._rows

    def restore(self, snapshot: list[dict[str, Any]]) -> None:
        """See `Storage`."""
        self._rows = snapshot


def _group_means(step: Step) -> list[float]:
    return [float(np.mean([one.reward for one in group.trajectories])) for group in step.groups]


def storages(draw: int, tolerate_steps: int, longest: int) -> dict[str, Callable[[], Storage]]:
    """What makes each storage, by the name of its row."""
    return {
        "ours": lambda: Ours(draw, tolerate_steps),
        "padded copies": lambda: PaddedCopies(draw, tolerate_steps, longest),
        "list of dicts": lambda: ListOfDicts(draw, tolerate_steps),
    }
