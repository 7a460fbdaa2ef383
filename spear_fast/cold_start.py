"""The policy a run starts from: loaded or built, then taught the tool format on expert demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spear_fast.assemble import Policy, build_policy, history_rule, load_policy, make_trainable
from spear_fast.config.schema import RunConfig
from spear_fast.dist import Ranks
from spear_fast.envs.base import TaskSet
from spear_fast.rollout.demos import demonstrate, demonstration_rows
from spear_fast.run_folder import RunFolder
from spear_fast.seeds import derive_seed
from spear_fast.types import Row
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig

if TYPE_CHECKING:
    from spear_fast.log.progress import Progress

IMITATION = PolicyLossConfig(kind="reinforce", aggregation="token-mean")
"""With advantage 1 on the expert's tokens, REINFORCE is the negative log-likelihood."""


def start_folder(config: RunConfig, folder: RunFolder) -> Path:
    """The Hugging Face folder that training starts from, and that a resumed run takes the architecture from."""
    if config.model.path is not None and not config.cold_start.steps:
        return Path(config.model.path)
    return folder.start_model


def prepare_start(config: RunConfig, tasks: TaskSet, progress: Progress, ranks: Ranks, folder: Path) -> None:
    """Write the policy before its first training step to `folder`: built or loaded, and cold-started.

    All ranks take part; the main rank writes.

    Raises:
        ConfigError, TaskError: Model, tokenizer or demonstrations cannot be had.
    """
    cold = config.cold_start
    demos = []
    if cold.steps:
        progress.phase("demonstrations")
        demos = demonstrate(tasks, cold.num_demos, max_turns=config.rollout.max_turns, seed=config.seed)
    path = config.model.path
    policy = build_policy(config, tasks, demos) if path is None else load_policy(path, config, tasks)
    make_trainable(policy, config, ranks)
    if demos:
        progress.phase("cold start")
        history = history_rule(config)
        rows = [
            row for uid, messages in enumerate(demos) for row in demonstration_rows(messages, policy.chat, uid, history)
        ]
        stats = imitate(policy, rows, config)
        progress.note(
            f"cold start: {cold.steps} steps on {len(demos)} demonstrations, "
            f"loss {stats['first']:.3f} -> {stats['last']:.3f} nats per token"
        )
    policy.save(folder, ranks)


def imitate(policy: Policy, rows: Sequence[Row], config: RunConfig) -> dict[str, float]:
    """Train on demonstrations for `cold_start.steps` optimizer steps.

    Returns:
        The loss of the first and of the last step, nats per action token.
    """
    cold = config.cold_start
    settings = OptimizerSettings(
        lr=cold.lr, warmup_steps=cold.warmup_steps, total_steps=cold.steps, grad_clip=config.update.grad_clip
    )
    updater = Updater(
        policy.model,
        settings,
        token_budget=config.update.token_budget,
        head_chunk_bytes=config.update.head_chunk_bytes,
        reduce_gradients=config.parallel.reduce_gradients,
        share_prompts=config.update.share_prompts,
    )
    losses = []
    batches = _batches(len(rows), cold.batch_size, derive_seed(config.seed, "cold_start"))
    for _, batch in zip(range(cold.steps), batches, strict=False):
        group = LossGroup([rows[index] for index in batch], IMITATION)
        losses.append(updater.optimizer_step([group], seed=0)["update/loss"])
    return {"first": losses[0], "last": losses[-1]}


def _batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of indices, each epoch in a fresh order; a rest smaller than a batch is carried over."""
    generator = np.random.default_rng(seed)
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, generator.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]
