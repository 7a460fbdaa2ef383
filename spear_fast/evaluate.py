"""Held-out evaluation: success with a confidence interval."""

from __future__ import annotations

from collections.abc import Callable

from spear_fast.config.schema import RunConfig
from spear_fast.data.prompts import eval_tasks
from spear_fast.dist import Ranks
from spear_fast.envs.base import TaskSet
from spear_fast.rewards.breakdown import success_by_type
from spear_fast.rollout.collection import Collection, merge, refuse_total_failure, rollout_stats
from spear_fast.rollout.collector import Collector
from spear_fast.statistics import wilson
from spear_fast.types import Group

FIRST_UID = 1 << 40
"""Apart from the uids of training, whose paused trajectories may be in the engine meanwhile."""


def _once(roll_out: Callable[[], Collection]) -> Collection:
    return roll_out()


def evaluate(
    config: RunConfig,
    tasks: TaskSet,
    collector: Collector,
    ranks: Ranks,
    attempt: Callable[[Callable[[], Collection]], Collection] = _once,
) -> tuple[dict[str, float], list[Group]]:
    """Roll out the held-out tasks and count successes.

    The draws do not depend on the training step, so that evaluations of one run are paired. A trajectory that failed
    for whatever reason counts as no success. `attempt` runs the rollout, again if its engine died.

    Returns:
        Statistics `eval/...` with the 95 % Wilson interval over tasks and, where tasks have types, the success of each
        as `eval/success/<type>`, and the groups. With several samples per task
        the interval treats a task as one trial, which is conservative.

    Raises:
        TaskError: The task set has no held-out tasks.
        EngineError: Every trajectory failed; the first error is quoted.
    """
    chosen = eval_tasks(tasks, config.eval.num_tasks, config.seed)

    def roll_out() -> Collection:
        own = collector.collect(
            chosen,
            config.eval.samples,
            tag="eval",
            first_uid=FIRST_UID,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            share=ranks.share(len(chosen)),
        )
        return merge(ranks.gather(own))

    collection = attempt(roll_out)
    groups, stats = collection.groups, rollout_stats(collection)
    refuse_total_failure(groups)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    rate = sum(trajectory.success for trajectory in trajectories) / len(trajectories)
    low, high = wilson(round(rate * len(groups)), len(groups))
    mean_calls = sum(trajectory.num_tool_calls for trajectory in trajectories) / len(trajectories)
    return {
        "eval/success_rate": rate,
        "eval/success_low": low,
        "eval/success_high": high,
        "eval/num_tasks": float(len(groups)),
        "eval/outcome_mean": sum(trajectory.outcome_reward for trajectory in trajectories) / len(trajectories),
        "eval/tool_calls_mean": mean_calls,
        "eval/turns_mean": stats["rollout/turns_mean"],
        "eval/failed_frac": sum(not trajectory.status.usable for trajectory in trajectories) / len(trajectories),
        **success_by_type(trajectories, "eval/success"),
    }, groups
