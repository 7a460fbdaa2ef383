"""One trajectory: the token record is exact, and whatever goes wrong ends in a status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.base import Info
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Completion
from spear_fast.rollout.episode import Episode, EpisodeLimits
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task, Trajectory
from tests.toys import ToolEnv, ToolTasks

LIMITS = EpisodeLimits(
    max_turns=4,
    max_turn_tokens=60,
    max_tokens=400,
    temperature=1.0,
    tool_timeout_s=5.0,
    tool_retries=0,
    env_timeout_s=5.0,
    max_observation_chars=100,
)
ECHO = '<tool_call>{"name": "echo", "arguments": {"text": "hi"}}</tool_call>'


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(
        train_tokenizer([ECHO, "digit? user assistant tool 0123456789"] * 9, 300),
        [tool_schema(t) for t in ToolEnv.tools],
    )


def play(chat: Chat, script: list[str] | Callable, tasks: ToolTasks | None = None, **limits) -> Trajectory:
    spoken = iter(script) if isinstance(script, list) else None
    reply = script if spoken is None else lambda _: chat.message(next(spoken))
    trajectory = Trajectory(Task("guess", "train", 0, seed=5), group_id=0, sample=0, uid=1, version=0)
    episode = Episode(
        trajectory, tasks or ToolTasks(None, 0), ScriptedEngine(reply), chat, replace(LIMITS, **limits), seed=1
    )
    return asyncio.run(episode.run())


def test_a_two_turn_episode_token_by_token(chat):
    trajectory = play(chat, [ECHO, "7"])
    opening = chat.prompt([{"role": "system", "content": "Be quick."}, {"role": "user", "content": "digit?"}])
    between = chat.continuation([{"role": "tool", "content": "hi"}], ended=True)
    first, second = chat.message(ECHO), chat.message("7")
    assert trajectory.tokens == opening + first + between + second
    assert trajectory.action_mask == (
        [False] * len(opening) + [True] * len(first) + [False] * len(between) + [True] * len(second)
    )
    assert len(trajectory.logps) == len(trajectory.tokens)
    assert [(turn.start, turn.end) for turn in trajectory.turns] == [
        (len(opening), len(opening) + len(first)),
        (len(trajectory.tokens) - len(second), len(trajectory.tokens)),
    ]
    assert [turn.anchor for turn in trajectory.turns] == ["digit?", "hi"]
    assert (trajectory.status, trajectory.success, trajectory.answered) == (Status.OK, True, True)
    assert (trajectory.num_tool_calls, trajectory.num_valid_tool_calls) == (1, 1)
    assert trajectory.outcome_reward == 1.0 and [turn.reward for turn in trajectory.turns] == [0.0, 1.0]
    assert [message["role"] for message in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_wrong_calls_count_but_not_as_valid(chat):
    trajectory = play(chat, ['<tool_call>{"name": "fail", "arguments": {}}</tool_call>', "7"])
    assert (trajectory.num_tool_calls, trajectory.num_valid_tool_calls) == (1, 0)
    assert [turn.action_valid for turn in trajectory.turns] == [False, True]


def test_turns_used_up_without_an_answer(chat):
    trajectory = play(chat, [ECHO] * 4)
    assert (trajectory.status, trajectory.answered, len(trajectory.turns)) == (Status.OK, False, 4)
    assert len(trajectory.tokens) == trajectory.turns[-1].end, "nothing may follow the last turn"


def test_token_limits_truncate(chat):
    cut = play(chat, ["1234567"], max_turn_tokens=3)
    assert (cut.status, cut.num_action_tokens, cut.success) == (Status.TRUNCATED, 3, False)
    opening = len(cut.tokens) - 3
    full = play(chat, [ECHO] * 4, max_tokens=opening + 2 * len(chat.message(ECHO)))
    assert full.status is Status.TRUNCATED and len(full.tokens) <= opening + 2 * len(chat.message(ECHO)) + 60


def test_what_a_limit_ends_is_scored_by_an_environment_that_can(chat):
    asked = []

    async def finish(text):
        asked.append(text)
        return -1.0, {"won": False, "answered": text is not None}

    endless = play(chat, [ECHO] * 4, Broken("finish", finish))
    assert (endless.outcome_reward, endless.answered, endless.status) == (-1.0, False, Status.OK)
    assert [turn.reward for turn in endless.turns] == [0.0, 0.0, 0.0, -1.0]
    cut = play(chat, ["1234567"], Broken("finish", finish), max_turn_tokens=3)
    assert (cut.outcome_reward, cut.answered, cut.status) == (-1.0, True, Status.TRUNCATED)
    assert asked[0] is None and "1234567".startswith(asked[1])
    ended = play(chat, [ECHO, "7"], Broken("finish", finish))
    assert ended.success and len(asked) == 2
    assert play(chat, [ECHO] * 4, Broken("finish", raises)).status is Status.ENV_ERROR


def test_a_megabyte_of_special_tokens_is_cut_and_defused(chat):
    trajectory = play(chat, ['<tool_call>{"name": "flood", "arguments": {}}</tool_call>', "7"], max_tokens=4000)
    assert trajectory.success
    result = trajectory.messages[3]["content"]
    assert len(result) < 200 and "characters left out" in result
    plain = play(chat, [ECHO, "7"])
    stops = [trajectory.tokens.count(chat.stop_ids[0]), plain.tokens.count(chat.stop_ids[0])]
    assert stops[0] == stops[1]


def test_a_hanging_tool_ends_as_tool_timeout(chat):
    hang = '<tool_call>{"name": "hang", "arguments": {"seconds": 30}}</tool_call>'
    trajectory = play(chat, [hang], tool_timeout_s=0.05)
    assert trajectory.status is Status.TOOL_TIMEOUT and "hang" in str(trajectory.error)
    own = play(chat, [hang], tool_timeouts_s={"hang": 0.05})
    assert own.status is Status.TOOL_TIMEOUT
    assert play(chat, [ECHO, "7"], tool_timeouts_s={"hang": 0.05}).success


class Broken(ToolTasks):
    def __init__(self, method: str, action: Callable) -> None:
        super().__init__(None, 0)
        self._method, self._action = method, action

    def make(self) -> ToolEnv:
        env = ToolEnv()
        setattr(env, self._method, self._action)
        return env


async def raises(*_, **__):
    raise RuntimeError("the environment is broken")


async def hangs(*_, **__):
    await asyncio.sleep(30)


@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize("action", [raises, hangs])
def test_broken_environments_end_as_env_error(chat, method, action):
    trajectory = play(chat, ["7"], Broken(method, action), env_timeout_s=0.05)
    assert trajectory.status is Status.ENV_ERROR and not trajectory.status.usable


def test_a_broken_close_keeps_the_result(chat):
    trajectory = play(chat, ["7"], Broken("close", raises))
    assert trajectory.success and "close failed" in str(trajectory.error)


def test_engine_failures_end_as_engine_abort(chat):
    def die(_):
        raise EngineError("gone")

    assert play(chat, die).status is Status.ENGINE_ABORT


def test_an_aborted_completion_ends_as_engine_abort(chat, monkeypatch):
    async def abort(self, request):
        return Completion([], [], "abort", 0)

    monkeypatch.setattr(ScriptedEngine, "generate", abort)
    assert play(chat, ["7"]).status is Status.ENGINE_ABORT


def test_a_lone_surrogate_in_a_result_is_replaced(chat):
    surrogate = '<tool_call>{"name": "echo", "arguments": {"text": "a\\ud83db"}}</tool_call>'
    trajectory = play(chat, [surrogate, "7"])
    assert trajectory.success and trajectory.messages[3]["content"] == "a?b"


def test_a_reward_that_is_not_finite_is_the_environments_error(chat):
    async def step(self, text=None):
        return "", float("nan"), True, False, Info()

    assert play(chat, ["7"], Broken("step", step)).status is Status.ENV_ERROR


def test_unreadable_bytes_are_noticed(chat):
    broken = chat.tokenizer.convert_tokens_to_ids("ð")
    assert play(chat, lambda _: [broken, chat.stop_ids[0]]).readable is False


def test_reset_may_bring_the_whole_conversation(chat):
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]

    class Env(ToolEnv):
        async def reset(self, *, seed, options):
            await super().reset(seed=seed, options=options)
            return "two", Info(messages=messages)

    class Tasks(ToolTasks):
        def make(self):
            return Env()

    assert play(chat, ["7"], Tasks(None, 0)).messages[:2] == messages
