"""The policy a run starts from: loaded or built, then taught the tool format on demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spear_fast.assemble import Policy, build_policy, history_rule, load_policy, make_trainable
from spear_fast.config.schema import RunConfig
from spear_fast.dist import Ranks
from spear_fast.envs.base import TaskSet
from spear_fast.errors import ConfigError
from spear_fast.imitation import Imitation
from spear_fast.rollout.demo_file import read_demos
from spear_fast.rollout.demos import LIMITS, Messages, demonstrate, demonstration_rows
from spear_fast.run_folder import RunFolder
from spear_fast.types import Row

if TYPE_CHECKING:
    from spear_fast.log.progress import Progress


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
        demos = load_demos(config, tasks)
    policy = untaught_policy(config, tasks, demos, ranks)
    if demos:
        progress.phase("cold start")
        imitation = Imitation(policy.model, demo_rows(demos, policy, config), config)
        losses = [imitation.step()["update/loss"] for _ in range(cold.steps)]
        progress.note(
            f"cold start: {cold.steps} steps on {len(demos)} demonstrations, "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token"
        )
    policy.save(folder, ranks)


def load_demos(config: RunConfig, tasks: TaskSet) -> list[Messages]:
    """Return the demonstrations to learn from: those of `cold_start.demos_file`, or played by the task's expert.

    Raises:
        TaskError: The file cannot be used, or there is no expert, or it failed.
    """
    cold = config.cold_start
    if cold.demos_file is not None:
        return read_demos(Path(cold.demos_file), tasks.tools)
    rollout = config.rollout
    limits = replace(
        LIMITS,
        tool_timeout_s=rollout.tool_timeout_s,
        tool_timeouts_s=rollout.tool_timeouts_s,
        env_timeout_s=rollout.env_timeout_s,
        max_observation_chars=rollout.max_observation_chars,
    )
    return demonstrate(tasks, cold.num_demos, max_turns=rollout.max_turns, seed=config.seed, limits=limits)


def untaught_policy(config: RunConfig, tasks: TaskSet, demos: Sequence[Messages], ranks: Ranks) -> Policy:
    """Return the policy before it saw any demonstration, ready for training: loaded from `model.path`, or built."""
    path = config.model.path
    policy = build_policy(config, tasks, list(demos)) if path is None else load_policy(path, config, tasks)
    make_trainable(policy, config, ranks)
    return policy


def demo_rows(demos: Sequence[Messages], policy: Policy, config: RunConfig) -> list[list[Row]]:
    """Return the training rows of each demonstration, as a rollout under the same configuration would make them.

    Raises:
        ConfigError: One is longer than any trajectory may be.
    """
    return list(_rows(demos, policy, config))


def _rows(demos: Sequence[Messages], policy: Policy, config: RunConfig) -> Iterator[list[Row]]:
    history, limit = history_rule(config), config.rollout.max_tokens
    for number, messages in enumerate(demos):
        rows = demonstration_rows(messages, policy.chat, number, history)
        longest = max(len(row.tokens) for row in rows)
        if longest > limit:
            raise ConfigError(
                f"rollout.max_tokens={limit} is too small for demonstration {number + 1} of {len(demos)}, which takes "
                f"{longest} tokens: the policy could never act like that; raise it, or leave the demonstration out"
            )
        yield rows
