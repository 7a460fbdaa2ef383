"""Many trajectories with slow, failing and hanging tools: the collector beside a lock-step loop and the shortest time.

python bench/agents.py --out bench/results/cpu/agents.json
python bench/agents.py --trajectories 32 --turns 3 --median-s 0.02 --timeout-s 0.3       # does it run?
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import cases
from bench.common.machine import describe_machine
from bench.engines.agent_load import (
    AgentTasks,
    Load,
    Plan,
    hanging,
    longest_trajectory,
    make_chat,
    scripted_engine,
    slowest_of_each_turn,
)
from bench.engines.lock_step import lock_step
from spear_fast.data.chat import Chat
from spear_fast.data.prompts import make_task
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.types import Status

COLUMNS: list[cases.Column] = [
    ("s", cases.number("median_s", ".2f")),
    ("spread", cases.number("spread", ".0%")),
    ("of the longest trajectory", cases.number("over_longest", ".2f")),
    ("won", cases.number("won", ".0f")),
    ("timed out", cases.number("timed_out", ".0f")),
]

Outcomes = list[Any]
"""For each trajectory True if won, False if not, None if a tool timed out, and the status's name for any other end."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print the table; 1 if a row failed or is refused."""
    args = _parser().parse_args(arguments)
    names = ("trajectories", "turns", "median_s", "sigma", "fail", "hang", "timeout_s")
    load = Load(**{name: getattr(args, name) for name in names})
    plan = load.plan(args.seed)
    calls = Counter(call.end for calls in plan for call in calls)
    result = {
        "benchmark": "agents",
        "machine": describe_machine(),
        "settings": {
            **asdict(load),
            "seed": args.seed,
            "repeats": args.repeats,
            "load_average_before": os.getloadavg()[0],
            "calls": dict(calls),
            "longest_trajectory_s": longest_trajectory(plan),
            "slowest_of_each_turn_s": slowest_of_each_turn(plan),
        },
        "cases": [
            {
                "name": f"{load.trajectories} trajectories of up to {load.turns} tool calls",
                "rows": {
                    "collector": row(collected, plan, load, args.repeats),
                    "lock step": row(in_lock_step, plan, load, args.repeats),
                },
            }
        ],
    }
    cases.write(result, args.out)
    cases.show(result, COLUMNS)
    print(
        f"longest trajectory {longest_trajectory(plan):.2f} s; turns' slowest calls {slowest_of_each_turn(plan):.2f} s"
    )
    return int(cases.wrong(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=cases.positive, default=512, help="in flight at once")
    parser.add_argument("--turns", type=cases.positive, default=6, help="tool calls of each")
    parser.add_argument("--median-s", type=float, default=0.25, help="median time of a call, log-normal")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of its logarithm")
    parser.add_argument("--fail", type=float, default=0.05, help="share of calls that raise")
    parser.add_argument("--hang", type=float, default=0.01, help="share of calls that never return")
    parser.add_argument("--timeout-s", type=float, default=4.0, help="time limit of a call")
    parser.add_argument("--seed", type=int, default=0, help="of the times and ends of calls")
    parser.add_argument("--repeats", type=cases.positive, default=3, help="timed runs, all of one plan")
    parser.add_argument("--out", type=Path, help="file for the result")
    return parser


def row(play: Callable[[AgentTasks, Chat, Load], Outcomes], plan: Plan, load: Load, repeats: int) -> cases.Row:
    """Time a way to play the plan; one whose trajectories do not all end as planned gets no time."""
    times, outcomes = [], []
    tasks = AgentTasks(plan)
    chat = make_chat(tasks)
    try:
        for _ in range(repeats):
            started = time.perf_counter()
            outcomes = play(tasks, chat, load)
            times.append(time.perf_counter() - started)
            wrong = complaint(plan, outcomes)
            if wrong is not None:
                return cases.refused(wrong)
    except Exception as error:  # the other row goes on
        return cases.unmeasured(error)
    found = cases.measured(times, won=outcomes.count(True), timed_out=outcomes.count(None))
    return found | {"over_longest": found["median_s"] / longest_trajectory(plan)}


def complaint(plan: Plan, outcomes: Outcomes) -> str | None:
    """Why the outcomes are not those of the plan, None if they are: a hang times out, all others are won."""
    late = set(hanging(plan))
    expected = [None if number in late else True for number in range(len(plan))]
    if outcomes == expected:
        return None
    wrong = [number for number, pair in enumerate(zip(outcomes, expected, strict=False)) if pair[0] is not pair[1]]
    return f"{len(outcomes)} of {len(plan)} trajectories ended; not as planned: {len(wrong)}, the first {wrong[:5]}"


def limits_of(load: Load) -> EpisodeLimits:
    """Limits that only a hanging tool exceeds."""
    return EpisodeLimits(
        max_turns=load.turns + 1,
        max_turn_tokens=128,
        max_tokens=256 * (load.turns + 2),
        temperature=1.0,
        tool_timeout_s=load.timeout_s,
        tool_retries=0,
        env_timeout_s=60.0,
        max_observation_chars=4096,
    )


def collected(tasks: AgentTasks, chat: Chat, load: Load) -> Outcomes:
    """Play by the collector, all trajectories in flight at once."""
    count = load.trajectories
    engine = scripted_engine(chat, load.turns)
    collector = Collector(tasks, engine, chat, limits_of(load), max_concurrent=count, seed=0)
    try:
        problems = [make_task(tasks.name, "train", index, 0) for index in range(count)]
        groups = collector.collect(problems, 1, tag="train/0").groups
    finally:
        collector.close()
    ends = {Status.OK: lambda one: one.success, Status.TOOL_TIMEOUT: lambda _: None}
    found = [one for group in groups for one in group.trajectories]
    return [ends.get(one.status, lambda one: one.status.value)(one) for one in found]


def in_lock_step(tasks: AgentTasks, chat: Chat, load: Load) -> Outcomes:
    """Play turn by turn."""
    return asyncio.run(lock_step(tasks, scripted_engine(chat, load.turns), chat, limits_of(load), load.trajectories))


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result for a README."""
    return cases.markdown_tables(result, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
