"""A text game with a row for each message: penalties, rewards and GiGPO's advantages, against a plain loop."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spear_fast.advantages import fill
from spear_fast.batching import rows_from_groups
from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.registry import make_task_set
from spear_fast.rewards import score
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.history import HistoryRule
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Group, Task, Trajectory, split_row_uid

PENALTY, GAMMA, WEIGHT, MU = 0.25, 0.9, 0.5, 0.75
MAX_STEPS = 10
LIMITS = EpisodeLimits(MAX_STEPS, 40, 700, 1.0, 5.0, 0, 5.0, 4096, history=HistoryRule("windowed", window=2))


def wander(chat: Chat) -> Collector:
    """A policy that takes any of the commands it is shown, and sometimes one that does not exist."""

    def reply(request: GenerationRequest) -> list[int]:
        draws = random.Random(request.seed)
        actions = str(chat.tokenizer.decode(request.prompt)).rsplit("Actions: ", 1)[1].split("<|im_end|>")[0]
        action = "sing" if draws.random() < 0.2 else draws.choice(actions.split(", "))
        return chat.message(f"<think>{draws.random()}</think><action>{action}</action>")

    params = {"num_rooms": 3, "with_key": False, "max_steps": MAX_STEPS, "invalid_penalty": PENALTY}
    tasks = make_task_set("treasure", params, seed=1)
    return Collector(tasks, ScriptedEngine(reply), chat, LIMITS, max_concurrent=8, seed=2)


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    chat = Chat(train_tokenizer(["Find the treasure. You are in the. Actions: go to, open chest, sing"] * 9, 400))
    chosen = [Task("treasure", "train", index, seed=0) for index in range(3)]
    played = wander(chat).collect(chosen, 6, tag="t", first_uid=70).groups
    score(played, mu=MU, variant="graded", count="turns", per_call=0.05)
    fill(played, estimator="gigpo", std_norm=False, step_weight=WEIGHT, gamma=GAMMA, step_std_norm=True)
    return played


def members(groups: list[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def test_a_penalty_is_the_steps_and_the_episodes(groups):
    seen = 0
    for member in members(groups):
        texts = [message["content"] for message in member.messages if message["role"] == "assistant"]
        invalid = ["sing" in text for text in texts]
        assert [not turn.action_valid for turn in member.turns] == invalid
        wanted = [-PENALTY * bad for bad in invalid]
        wanted[-1] += member.success
        assert [turn.reward for turn in member.turns] == pytest.approx(wanted)
        assert member.outcome_reward == pytest.approx(member.success - PENALTY * sum(invalid))
        assert member.reward == pytest.approx(member.outcome_reward + MU * min(1.0, 0.05 * len(texts)))
        seen += sum(invalid)
    assert seen and 0 < sum(member.success for member in members(groups)) < len(members(groups))
    assert {member.task_type for member in members(groups)} == {"treasure"}


def slow_advantages(groups: list[Group]) -> dict[tuple[int, int], float]:
    """The advantage of every (trajectory, message), in float64."""
    wanted = {}
    for group in groups:
        mean = sum(member.reward for member in group.trajectories) / len(group.trajectories)
        returns, states = {}, {}
        for member in group.trajectories:
            total = 0.0
            for place in reversed(range(len(member.turns))):
                total = member.turns[place].reward + GAMMA * total
                returns[member.uid, place] = total
                states.setdefault(member.turns[place].anchor, []).append((member.uid, place))
        for same in states.values():
            values = [returns[key] for key in same]
            centre = sum(values) / len(values)
            spread = (sum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5
            for key in same:
                step = (returns[key] - centre) / (spread + 1e-6) if len(same) > 1 else 0.0
                member = next(m for m in group.trajectories if m.uid == key[0])
                wanted[key] = member.reward - mean + WEIGHT * step
    return wanted


def test_gigpo_gives_each_row_the_advantage_of_its_step(groups):
    wanted = slow_advantages(groups)
    rows = rows_from_groups(groups)
    assert {split_row_uid(row.uid) for row in rows} == set(wanted)
    assert len({row.uid for row in rows}) == len(rows) == sum(len(member.turns) for member in members(groups))
    for row in rows:
        value = wanted[split_row_uid(row.uid)]
        np.testing.assert_allclose(row.advantages[row.action_mask], value, rtol=1e-5, atol=1e-6)
        assert not row.advantages[~row.action_mask].any()
        # One message behind its prompt.
        assert np.flatnonzero(np.diff(row.action_mask.astype(int))).tolist() == [
            row.num_tokens - row.num_action_tokens - 1
        ]
    assert len({round(value, 6) for value in wanted.values()}) > 20, "too few different advantages to tell rows apart"
