"""Seeded batches of long-tailed rollouts for `bench/updates/frozen.py`: single-turn, with tools, and of a text game.

python bench/freeze.py --size cpu --kind tool --out runs/tool.safetensors
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import random_policy
from bench.updates.frozen import Frozen, describe, write
from spear_fast.types import Row
from spear_fast.update.model import PackedModel, load_model
from spear_fast.update.scoring import Scorer

Score = Callable[[Sequence[Row]], list[np.ndarray]]
# Log-ratios of the present policy to the sampler's, in nats. None is near a bound of the usual clip ranges, where
# rounding would decide on which side it falls: most are inside all, the others outside one or more.
NEAR, SHIFT = 0.07, 0.08
OUTSIDE = ((-1.2, -0.5), (0.5, 1.0), (1.8, 2.4))
OUTSIDE_SHARE = 0.06
REFERENCE_GAP = 0.1
"""Standard deviation of the log-ratios to the reference policy, in nats."""


@dataclass(frozen=True)
class Shape:
    """What a batch looks like; ranges are inclusive and uniform, a message's length is log-normal and cut."""

    kind: str
    groups: int
    group_size: int
    prompt: tuple[int, int]
    """Tokens of a prompt, equal within a group."""
    turns: tuple[int, int]
    """Messages of the policy."""
    message: tuple[float, float, int]
    """Median in tokens, standard deviation of its logarithm, longest."""
    observation: tuple[int, int]
    """Tokens between two messages, which the policy did not write."""
    longest: int
    """Tokens of a completion; it is cut there."""
    dead_groups: int
    """Groups whose rewards are all equal, so that their advantages are 0."""


def _shapes(groups: int, group_size: int, scale: int, dead: int) -> dict[str, Shape]:
    """The three kinds; lengths are multiples of `scale` tokens."""
    return {
        shape.kind: shape
        for shape in (
            Shape("single", groups, group_size, (8 * scale, 16 * scale), (1, 1), (14 * scale, 0.9, 64 * scale),
                  (0, 0), 64 * scale, dead),
            Shape("tool", groups, group_size, (12 * scale, 20 * scale), (1, 4), (8 * scale, 0.7, 24 * scale),
                  (4 * scale, 12 * scale), 80 * scale, dead),
            Shape("game", groups, group_size, (16 * scale, 20 * scale), (2, 12), (3 * scale, 0.5, 8 * scale),
                  (2 * scale, 6 * scale), 96 * scale, dead),
        )
    }  # fmt: skip


SHAPES = {
    "tiny": _shapes(groups=2, group_size=2, scale=1, dead=0),
    "cpu": _shapes(groups=4, group_size=4, scale=3, dead=1),
    "qwen2.5-1.5b": _shapes(groups=16, group_size=8, scale=32, dead=4),
}
"""Batches by size of model and kind."""
KINDS = tuple(SHAPES["tiny"])
GATE = replace(_shapes(groups=2, group_size=2, scale=2, dead=0)["tool"], kind="gate")
"""A batch small enough to compare every loss on it, with tools, so that each mask matters."""


def main(arguments: list[str] | None = None) -> int:
    """Write the file that the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SHAPES, default="cpu", help="of model and batch")
    parser.add_argument("--kind", choices=KINDS, default="single")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the model scores the batch")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        score = scorer(random_policy.build(args.size, Path(folder), seed=args.seed, device=args.device), args.device)
    frozen = freeze(SHAPES[args.size][args.kind], score, random_policy.model_shape(args.size)["vocab_size"], args.seed)
    write(frozen, args.out)
    print(describe(frozen))
    return 0


def scorer(folder: Path, device: str | torch.device) -> Score:
    """What gives log-probs [L] of each row's action tokens under the float32 model in a folder."""
    model = load_model(str(folder), torch.float32)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return Scorer(PackedModel(model), token_budget=8192).score


def freeze(shape: Shape, score: Score, vocab_size: int, seed: int) -> Frozen:
    """Draw a batch, and log-probs of a sampler and a reference near those that `score` gives it.

    Of the action tokens `OUTSIDE_SHARE` have log-ratios beyond the usual clip ranges; whole sequences are shifted too,
    so that sequence-level ratios differ from 1. Advantages are those of GRPO: rewards of 0 or 1, standardised within
    the group.
    """
    rng = np.random.default_rng(seed)
    rewards = _rewards(shape, rng)
    rows = _unscored(shape, rewards, vocab_size, rng)
    scored = score(rows)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    sampler = [_sampler_logp(logp, row.action_mask, rng) for logp, row in zip(scored, rows, strict=True)]
    reference = [
        np.where(row.action_mask, np.minimum(logp + rng.normal(scale=REFERENCE_GAP, size=len(logp)), 0), 0)
        for logp, row in zip(scored, rows, strict=True)
    ]
    return Frozen(
        name=shape.kind,
        vocab_size=vocab_size,
        lengths=np.array([row.num_tokens for row in rows], dtype=np.int64),
        prompt_lengths=np.array([row.action_mask.argmax() for row in rows], dtype=np.int64),
        group_ids=np.array([row.group_id for row in rows], dtype=np.int64),
        rewards=rewards.reshape(-1).astype(np.float32),
        advantages=advantages.reshape(-1).astype(np.float32),
        tokens=np.concatenate([row.tokens for row in rows]),
        action_mask=np.concatenate([row.action_mask for row in rows]),
        sampler_logp=np.concatenate(sampler).astype(np.float32),
        ref_logp=np.concatenate(reference).astype(np.float32),
        notes={"seed": seed, "shape": asdict(shape)},
    )


def _unscored(shape: Shape, rewards: np.ndarray, vocab_size: int, rng: np.random.Generator) -> list[Row]:
    """Rows with random tokens, and log-probs and advantages of 0."""
    rows = []
    for group in range(shape.groups):
        prompt = rng.integers(vocab_size, size=rng.integers(shape.prompt[0], shape.prompt[1] + 1))
        for member in range(shape.group_size):
            mask = np.concatenate([np.zeros(len(prompt), dtype=bool), _completion(shape, rng)])
            tokens = np.concatenate([prompt, rng.integers(vocab_size, size=len(mask) - len(prompt))])
            nothing = np.zeros(len(mask), dtype=np.float32)
            reward = float(rewards[group, member])
            rows.append(Row(len(rows), group, 0, tokens.astype(np.int32), mask, nothing, nothing, reward))
    return rows


def _rewards(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Rewards 0 or 1, [groups, group_size]; the last groups are dead, the others are not."""
    rewards = rng.integers(2, size=(shape.groups, shape.group_size)).astype(np.float64)
    rewards[:, 0], rewards[:, -1] = 0.0, 1.0
    rewards[shape.groups - shape.dead_groups :] = 0.0
    return rewards


def _completion(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Which tokens of a completion are the policy's, bool [n]: messages with observations between them."""
    median, spread, longest = shape.message
    turns = int(rng.integers(shape.turns[0], shape.turns[1] + 1))
    lengths = np.clip(np.exp(rng.normal(np.log(median), spread, size=turns)), 1, longest).astype(np.int64)
    observations = rng.integers(shape.observation[0], shape.observation[1] + 1, size=turns)
    observations[-1] = 0
    repeats = np.stack([lengths, observations], axis=1).reshape(-1)
    return np.repeat(np.tile([True, False], turns), repeats)[: shape.longest]


def _sampler_logp(logp: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log-probs [L] of the sampler, at most 0, at the distances described above from those of the present policy."""
    ratio = SHIFT * rng.integers(-1, 2) + rng.uniform(-NEAR, NEAR, size=len(logp))
    bounds = np.array(OUTSIDE)[rng.integers(len(OUTSIDE), size=len(logp))]
    ratio = np.where(rng.random(len(logp)) < OUTSIDE_SHARE, rng.uniform(bounds[:, 0], bounds[:, 1]), ratio)
    return np.where(mask, np.minimum(logp - ratio, 0), 0)


if __name__ == "__main__":
    sys.exit(main())
