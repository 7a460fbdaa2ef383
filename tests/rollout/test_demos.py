"""Demonstrations: rows hold exactly the tokens that a rollout of the same messages would have."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from spear_fast.cold_start import load_demos
from spear_fast.config.schema import RunConfig
from spear_fast.data.chat import Chat
from spear_fast.data.prompts import make_task
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import TaskError
from spear_fast.rollout.demos import demonstrate, demonstration_rows, demonstration_text
from spear_fast.rollout.episode import Episode
from spear_fast.rollout.history import HistoryRule
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Trajectory, row_uid
from tests.rollout.test_episode import LIMITS
from tests.toys import GUESS_RUN, GuessEnv, GuessTasks


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("calculator", HistoryRule()),
        ("treasure", HistoryRule()),
        ("calculator", HistoryRule("windowed", window=1, drop_thoughts=False)),
        ("treasure", HistoryRule("windowed", window=2)),
    ],
)
def test_rows_equal_a_rollout_of_the_same_messages(name, rule):
    tasks = make_task_set(name, {}, seed=1)
    demos = demonstrate(tasks, 6, max_turns=30, seed=2)
    chat = Chat(train_tokenizer(map(demonstration_text, demos), 400), [tool_schema(tool) for tool in tasks.tools])
    for index, messages in enumerate(demos):
        spoken = iter([m["content"] for m in messages if m["role"] == "assistant"])
        trajectory = Trajectory(make_task(name, "demo", index, 2), 0, 0, 0, 0)
        limits = replace(LIMITS, max_turns=30, max_tokens=4096, max_observation_chars=4096, history=rule)
        engine = ScriptedEngine(lambda _, spoken=spoken: chat.message(next(spoken)))
        asyncio.run(Episode(trajectory, tasks, engine, chat, limits, seed=0).run())
        rows = demonstration_rows(messages, chat, index, rule)
        assert trajectory.success
        assert [row.tokens.tolist() for row in rows] == [trajectory.tokens[a:b] for a, b in trajectory.row_spans]
        masks = [trajectory.action_mask[a:b] for a, b in trajectory.row_spans]
        assert [row.action_mask.tolist() for row in rows] == masks
        assert len(rows) == (len(trajectory.turns) if rule.mode == "windowed" else 1)
        assert [(row.uid, row.group_id) for row in rows] == [(row_uid(index, k), index) for k in range(len(rows))]
        assert all(np.array_equal(row.advantages, row.action_mask.astype(np.float32)) for row in rows)


def test_a_task_set_without_an_expert_is_refused():
    class Mute:
        tools = ()
        reset, step, close = GuessEnv.reset, GuessEnv.step, GuessEnv.close

    class Tasks(GuessTasks):
        def make(self):
            return Mute()

    with pytest.raises(TaskError, match=r"has no expert\(\)"):
        demonstrate(Tasks(None, 0), 2, max_turns=2, seed=0)


def test_an_expert_that_fails_is_reported():
    class Wrong(GuessEnv):
        def expert(self):
            return "x"

    class Tasks(GuessTasks):
        def make(self):
            return Wrong()

    with pytest.raises(TaskError, match="expert of 'guess' failed on demo task 0"):
        demonstrate(Tasks(None, 0), 2, max_turns=2, seed=0)


def test_a_cold_start_teaches_observations_cut_as_rollouts_cut_them():
    class Wordy(GuessEnv):
        async def reset(self, *, seed, options):
            self.asked = False
            return await super().reset(seed=seed, options=options)

        async def step(self, text):
            if self.asked:
                return await super().step(text)
            self.asked = True
            return "!" * 500, 0.0, False, False, {}

    class Tasks(GuessTasks):
        def make(self):
            return Wordy()

    whole = demonstrate(Tasks(None, 0), 1, max_turns=2, seed=0)
    assert whole[0][2]["content"] == "!" * 500
    rollout = GUESS_RUN["rollout"] | {"max_observation_chars": 100}
    cut = load_demos(RunConfig.model_validate(GUESS_RUN | {"rollout": rollout}), Tasks(None, 0))
    assert "400 characters left out" in cut[0][2]["content"]


@pytest.mark.parametrize("rule", [HistoryRule(), HistoryRule("windowed", window=1)])
def test_messages_of_weight_0_are_shown_and_not_learned(rule):
    talk = ["ask one", "reply one", "ask two", "reply two", "ask three", "reply three"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    chat = Chat(train_tokenizer(talk * 9, 300), [])
    few_shot = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    rows = demonstration_rows(few_shot, chat, 0, rule)
    for row in rows:
        assert row.tokens[: len(chat.prompt(messages[:3]))].tolist() == chat.prompt(messages[:3])
    learned = [chat.decode(row.tokens[row.action_mask].tolist())[0] for row in rows]
    assert "".join(learned).replace("<|im_end|>", "") == "reply tworeply three"
    late = [*messages[:5], {**messages[5], "weight": 0}]
    learned = [chat.decode(row.tokens[row.action_mask].tolist())[0] for row in demonstration_rows(late, chat, 0, rule)]
    assert "".join(learned).replace("<|im_end|>", "") == "reply onereply two"
