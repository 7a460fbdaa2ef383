"""Inputs of the operators on packed batches, these operators, and the same in plain torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.layers.problems import Shape, action_mask
from spear_kernels import (
    SegmentStats,
    discounted_returns,
    group_advantages,
    max_ngram_counts,
    recalibrated_advantages,
    segment_stats,
    span_index,
    spread,
    step_advantages,
)

VOCABULARY = 151_936
GROUP, STEPS, ANCHORED, BASELINE, NGRAM, GAMMA = 16, 64, 16, 10_240, 20, 0.95
"""Samples per prompt, steps per episode, mean steps per state, groups in the reward baseline, run length, discount."""
EPSILON, TRL_EPSILON = 1e-6, 1e-4
"""What is added to a standard deviation, here and in verl, and in TRL."""


@dataclass(frozen=True, eq=False)
class BatchProblem:
    """Tensors by name; which are there depends on the operator."""

    operator: str
    shape: Shape
    tensors: dict[str, torch.Tensor]
    leaves: tuple[torch.Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(iter(self.tensors.values())).device

    @property
    def rotating_bytes(self) -> int:
        """All inputs."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def least_bytes(self, backward: bool) -> int:
        """Inputs read once and one float32 per row of the result written."""
        results = {"grpo": self.shape.num_rows, "repetition": self.shape.num_seqs}
        rows = results.get(self.operator, len(next(iter(self.tensors.values()))))
        return self.rotating_bytes - self._unread_bytes() + 4 * rows

    def _unread_bytes(self) -> int:
        """Of inputs that only some projects want: rewards by token."""
        return self.tensors["token_rewards"].nbytes if "token_rewards" in self.tensors else 0

    def rotated(self, num_copies: int) -> list[BatchProblem]:
        """This problem and copies of all inputs."""
        copies = [
            replace(self, tensors={name: tensor.clone() for name, tensor in self.tensors.items()})
            for _ in range(num_copies - 1)
        ]
        return [self, *copies]


def make_batch(shape: Shape, operator: str, device: torch.device, seed: int = 0) -> BatchProblem:
    """Inputs of one operator for `shape.num_rows` tokens, or as many samples or steps, float32 and int64."""
    torch.manual_seed(seed)
    rows, length = shape.num_rows, shape.seq_len
    values, order = torch.rand(rows), torch.arange(rows)
    if operator == "grpo":
        rewards = torch.rand(shape.num_seqs)
        by_token = torch.zeros(shape.num_seqs, length)
        by_token[:, -1] = rewards
        tensors = {
            "rewards": rewards,
            "groups": torch.arange(shape.num_seqs) // GROUP,
            "starts": torch.arange(0, rows, length),
            "mask": action_mask(shape, drop_last=False),
            "token_rewards": by_token,
        }
    elif operator == "repetition":
        # Half of the texts repeat 64 tokens with 2 % replaced, the others do not repeat.
        uniform = torch.randint(VOCABULARY, (shape.num_seqs, length))
        phrases = torch.randint(VOCABULARY, (shape.num_seqs, 64)).repeat(1, -(-length // 64))[:, :length]
        loops = torch.where(torch.rand(shape.num_seqs, length) < 0.02, uniform, phrases)
        ids = torch.where(torch.arange(shape.num_seqs)[:, None] % 2 == 0, uniform, loops)
        tensors = {"ids": ids.reshape(-1), "seqs": order // length}
    else:
        tensors = {"values": values}
        tensors |= {
            "group_advantages": lambda: {"groups": order // GROUP},
            "discounted_returns": lambda: {"episodes": order // STEPS},
            "step_advantages": lambda: {"anchors": torch.randint(-1, rows // ANCHORED, (rows,))},
            "recalibrate": lambda: {
                "stored": values - 0.5,
                "means": torch.rand(BASELINE),
                "stds": torch.rand(BASELINE),
            },
            "segment_stats": lambda: {"labels": (order // GROUP)[torch.randperm(rows)]},
        }[operator]()
    return BatchProblem(operator, shape, {name: tensor.to(device) for name, tensor in tensors.items()})


Operation = Callable[[dict[str, torch.Tensor], Shape], tuple[torch.Tensor, ...]]


def _own_grpo(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    advantages = group_advantages(t["rewards"], t["groups"], std_norm=True)
    return (spread(advantages, span_index(t["starts"], t["starts"] + shape.seq_len, shape.num_rows), t["mask"]),)


def _own_recalibrate(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    return tuple(recalibrated_advantages(t["values"], t["means"], t["stds"], t["stored"]))


def _of_labels(stats: SegmentStats) -> tuple[torch.Tensor, ...]:
    return stats.mean, stats.std, stats.deviation


OWN: dict[str, Operation] = {
    "grpo": _own_grpo,
    "group_advantages": lambda t, shape: (group_advantages(t["values"], t["groups"], std_norm=True),),
    "discounted_returns": lambda t, shape: (discounted_returns(t["values"], t["episodes"], GAMMA),),
    "step_advantages": lambda t, shape: (step_advantages(t["values"], t["anchors"], std_norm=True),),
    "recalibrate": _own_recalibrate,
    "segment_stats": lambda t, shape: _of_labels(segment_stats(t["values"], t["labels"])),
    "repetition": lambda t, shape: (max_ngram_counts(t["ids"], t["seqs"], NGRAM, num_seqs=shape.num_seqs),),
}
"""This project's operators by variant."""


def _moments(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Size, mean and sample standard deviation of each label, and deviation of each row, in two passes."""
    zeros = values.new_zeros(int(labels.max()) + 1)
    count = zeros.index_add(0, labels, torch.ones_like(values))
    mean = zeros.index_add(0, labels, values) / count
    deviation = values - mean[labels]
    std = (zeros.index_add(0, labels, deviation.square()) / (count - 1).clamp(min=1)).sqrt()
    return count, mean, std, deviation


def _normed(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    _, _, std, deviation = _moments(values, labels)
    return deviation / (std[labels] + EPSILON)


def _naive_grpo(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    advantages = _normed(t["rewards"], t["groups"])
    return (advantages.repeat_interleave(shape.seq_len) * t["mask"],)


def _naive_returns(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    rewards = t["values"].view(-1, STEPS)
    returns, running = torch.empty_like(rewards), torch.zeros_like(rewards[:, 0])
    for step in reversed(range(STEPS)):
        running = rewards[:, step] + GAMMA * running
        returns[:, step] = running
    return (returns.view(-1),)


def _naive_steps(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    labels = t["anchors"] + 1
    count = torch.bincount(labels)[labels]
    return (_normed(t["values"], labels).masked_fill((t["anchors"] < 0) | (count == 1), 0),)


def _naive_recalibrate(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    renewed = (t["values"] - t["means"].quantile(0.5)) / (t["stds"].quantile(0.5) + EPSILON)
    return renewed, (renewed > 0) & (t["stored"] > 0)


def _naive_repetition(t: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, ...]:
    most = []
    for ids in t["ids"].view(shape.num_seqs, shape.seq_len).tolist():
        runs = Counter(tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1))
        most.append(max(runs.values(), default=0))
    return (torch.tensor(most, device=t["ids"].device),)


NAIVE: dict[str, Operation] = {
    "grpo": _naive_grpo,
    "group_advantages": lambda t, shape: (_normed(t["values"], t["groups"]),),
    "discounted_returns": _naive_returns,
    "step_advantages": _naive_steps,
    "recalibrate": _naive_recalibrate,
    "segment_stats": lambda t, shape: _moments(t["values"], t["labels"])[1:],
    "repetition": _naive_repetition,
}
"""The same in plain torch, the repetition filter in plain Python."""
