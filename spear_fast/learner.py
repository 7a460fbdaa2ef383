"""From a configuration to what learns: the updater, the replay memory, the update of a training step, the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spear_fast.assemble import Policy, load_policy, spread
from spear_fast.config.schema import RunConfig
from spear_fast.dist import Ranks
from spear_fast.envs.base import TaskSet
from spear_fast.losses.terms import on_policy_terms, replay_terms
from spear_fast.replay.memory import ReplayMemory
from spear_fast.run_folder import RunFolder
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.policy_update import PolicyUpdate
from spear_fast.update.scoring import Scorer
from spear_fast.update.step import Updater


def make_updater(config: RunConfig, policy: Policy, folder: RunFolder) -> Updater:
    """Return the updater that the configuration describes."""
    update = config.update
    settings = OptimizerSettings(
        lr=update.lr,
        warmup_steps=update.warmup_steps,
        betas=update.betas,
        weight_decay=update.weight_decay,
        grad_clip=update.grad_clip,
    )
    return Updater(
        policy.model,
        settings,
        token_budget=update.token_budget,
        temperature=config.rollout.temperature,
        head_chunk_bytes=update.head_chunk_bytes,
        dump_folder=folder.nonfinite,
        reduce_gradients=config.parallel.reduce_gradients,
        share_prompts=config.update.share_prompts,
    )


def make_memory(config: RunConfig, tasks: TaskSet) -> ReplayMemory:
    """Return the replay memory that the configuration describes."""
    replay = config.algo.replay
    return ReplayMemory(
        buffer_size=replay.buffer_size,
        baseline_size=replay.baseline_size,
        tolerate_steps=replay.tolerate_steps,
        ripe_factor=replay.ripe_factor,
        require_tool_call=replay.require_tool_call and bool(tasks.tools),
        recalibrate=replay.recalibrate,
        decay_weight=replay.decay_weight,
        std_norm=config.algo.advantage.std_norm,
    )


def make_policy_update(config: RunConfig, updater: Updater) -> PolicyUpdate:
    """Return the update that the configuration describes."""
    replay = config.algo.replay
    terms = on_policy_terms(**config.algo.loss.model_dump(exclude={"stats"}), max_tokens=config.rollout.max_tokens)
    return PolicyUpdate(
        updater=updater,
        on_policy=terms,
        replayed=replay_terms(
            terms, cov_ratio=replay.cov_ratio, cov_lower=replay.cov_lower, cov_upper=replay.cov_upper
        ),
        stats=config.algo.loss.stats,
        mode=replay.mode,
        mini_batch_size=config.update.mini_batch_size,
        epochs=config.update.epochs,
    )


def load_reference(config: RunConfig, tasks: TaskSet, start: Path, updater: Updater, ranks: Ranks) -> Scorer:
    """Return the policy that the KL term pulls to: the one before the first training step."""
    policy = load_policy(start, config, tasks)
    policy.model.model.requires_grad_(False)
    spread(policy, config, ranks)
    return replace(updater.scorer, policy=policy.model)
