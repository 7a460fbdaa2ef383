"""Environments of the real gymnasium as tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, ClassVar

import gymnasium
import pytest
from gymnasium import spaces

from spear_fast.envs.adapters.gymnasium import GymnasiumTasks
from spear_fast.envs.base import Demonstrator
from spear_fast.envs.registry import make_task_set
from spear_fast.errors import ConfigError, TaskError
from spear_fast.types import Status
from tests.environments_page import play, play_async


class Echo(gymnasium.Env):
    """Wants the words of its info, or ends; what it was given is kept for the tests."""

    opened: ClassVar[list[Echo]] = []

    def __init__(self, alphabet: str = "", discrete: bool = False, hang_s: float = 0.0, steps: int = 0) -> None:
        self.action_space: Any = spaces.Discrete(3, start=5) if discrete else spaces.Text(20)
        if alphabet:
            self.action_space = spaces.Text(20, charset=alphabet)
        self.observation_space = spaces.Text(20)
        self.hang_s, self.steps, self.taken, self.closed = hang_s, steps, [], 0
        self.opened.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed = seed
        return f"seed {seed}", {"commands": ["Go Home", "stay"], "solved": False}

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.hang_s)
        self.taken.append(action)
        self.thread = threading.current_thread()
        over = len(self.taken) == self.steps
        home = action == "Go Home"
        return f"took {action}", float(home), home, over, {"commands": ["Go Home", "stay"], "solved": action == "stay"}

    def close(self) -> None:
        self.closed += 1


gymnasium.register("SpearEcho-v0", Echo)


@pytest.fixture(autouse=True)
def _none_opened() -> None:
    Echo.opened.clear()


def make(kwargs: dict[str, Any] | None = None, **params: Any) -> GymnasiumTasks:
    given = {"id": "tests.envs.test_adapter_gymnasium:Echo", "kwargs": kwargs or {}, "max_steps": 3, **params}
    tasks = make_task_set("gymnasium", given, 0)
    assert isinstance(tasks, GymnasiumTasks)
    return tasks


def echoes() -> list[Any]:
    """Made by whichever import of this file the adapter found, without the one that was made to check."""
    import tests.envs.test_adapter_gymnasium as found  # pyright: ignore[reportMissingImports]

    return found.Echo.opened[1:]


def test_text_with_spaces_reaches_an_environment_with_the_default_alphabet() -> None:
    tasks = make()
    played = play(tasks, lambda _: "<action>take the lamp</action>")
    assert played.error is None and [turn.action_valid for turn in played.turns] == [True] * 3
    assert played.messages[3]["content"] == "took take the lamp"
    registered = make(id="SpearEcho-v0")
    assert play(registered, lambda _: "<action>take the lamp</action>").messages[3]["content"] == "took take the lamp"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({}, "no tag"), ({}, f"<action>{'a' * 21}</action>"), ({"alphabet": "abc"}, "<action>abd</action>")],
)
def test_what_is_no_action_changes_nothing_and_costs(kwargs: dict[str, Any], message: str) -> None:
    played = play(make(kwargs, invalid_penalty=0.25), lambda _: message)
    assert (played.outcome_reward, len(played.turns), played.turns[0].action_valid) == (-0.75, 3, False)
    assert played.messages[3]["content"] == f"Invalid action. {played.messages[1]['content']}"
    assert played.turns[1].anchor == played.turns[0].anchor == played.messages[1]["content"]


def test_names_of_discrete_actions() -> None:
    for names in (["left", "right", "Wait Here"], {"left": 5, "right": 6, "Wait Here": 7}):
        played = play(make({"discrete": True}, action_names=names), lambda _: "<action>wait  HERE</action>")
        assert played.messages[1]["content"].endswith(" Actions: left, right, Wait Here")
        assert played.messages[3]["content"].startswith("took 7")


def test_commands_of_info_are_shown_and_enforced() -> None:
    tasks = make(actions_key="commands")
    won = play(tasks, lambda _: "<action>go home</action>")
    assert (won.success, won.outcome_reward, len(won.turns)) == (True, 1.0, 1)
    assert won.messages[1]["content"].endswith("Actions: Go Home, stay")
    assert not play(tasks, lambda _: "<action>go away</action>").turns[0].action_valid
    with pytest.raises(TaskError, match=r"no key task\.params\.actions_key='orders'"):
        asyncio.run(play_raw(make(actions_key="orders")))


async def play_raw(tasks: GymnasiumTasks) -> None:
    await tasks.make().reset(seed=0, options={"split": "train", "index": 0})


def test_truncation_is_not_termination() -> None:
    async def last(tasks: GymnasiumTasks, count: int, action: str) -> Any:
        env = tasks.make()
        await env.reset(seed=0, options={"split": "train", "index": 0})
        for _ in range(count):
            result = await env.step(f"<action>{action}</action>")
        return result[2:4], result[4].get("won")

    assert asyncio.run(last(make({"steps": 2}), 2, "stay")) == ((False, True), False)
    assert asyncio.run(last(make(), 3, "stay")) == ((False, True), False)
    assert asyncio.run(last(make(), 3, "Go Home")) == ((True, False), True)
    assert asyncio.run(last(make({"steps": 2}, success_key="solved"), 2, "stay")) == ((False, True), True)


def test_splits_have_disjoint_seeds_and_held_out_ones_do_not_depend_on_the_run() -> None:
    tasks = make(num_eval=50, num_train=50)
    seeds = {split: {tasks.seed(split, index) for index in range(50)} for split in ("train", "eval")}
    assert not seeds["train"] & seeds["eval"] and all(len(each) == 50 for each in seeds.values())
    other = make_task_set("gymnasium", tasks.params.model_dump(), 1)
    assert isinstance(other, GymnasiumTasks)
    assert other.seed("eval", 3) == tasks.seed("eval", 3) and other.seed("train", 3) != tasks.seed("train", 3)
    same = {play(tasks, lambda _: "", index=4).messages[1]["content"] for _ in range(2)}
    assert same == {f"seed {tasks.seed('train', 4)}"}
    with pytest.raises(TaskError, match="has no split 'demo'"):
        tasks.size("demo")
    assert not isinstance(tasks.make(), Demonstrator)


def test_slow_environments_run_beside_each_other_and_are_closed() -> None:
    barrier = threading.Barrier(8, timeout=60)
    tasks = make(render_text="tests.envs.test_adapter_gymnasium:meet", max_steps=1)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(play_async(tasks, lambda _: "<action>a</action>", index=i) for i in range(8)))

    meeting["barrier"] = barrier
    try:
        played = asyncio.run(all_of_them())
    finally:
        meeting.clear()
    assert [each.error for each in played] == [None] * 8
    assert [each.closed for each in echoes()] == [1] * 8


meeting: dict[str, threading.Barrier] = {}


def meet(env: Any, observation: Any, info: Any) -> str:
    """Waits, in a step, until eight episodes are there: without threads none would ever pass."""
    import tests.envs.test_adapter_gymnasium as found  # pyright: ignore[reportMissingImports]

    if env.taken:
        found.meeting["barrier"].wait()
    return str(observation)


def test_an_environment_that_hangs_ends_its_trajectory_and_is_not_touched_again() -> None:
    tasks = make({"hang_s": 4.0})
    played = play(tasks, lambda _: "<action>a</action>", env_timeout_s=1.0)
    assert played.status is Status.ENV_ERROR and "no answer within" in str(played.error)
    assert echoes()[0].closed == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"id": "NoSuchEnvironment-v0"}, "environment cannot be made"),
        ({"id": "tests.envs.test_adapter_gymnasium:Nothing"}, "environment cannot be made"),
        ({"kwargs": {"colour": 1}}, "environment cannot be made"),
        ({"id": "CartPole-v1", "action_names": ["left", "right"]}, "the observation is ndarray, not text"),
        ({"id": "CartPole-v1"}, "action_names is missing"),
        ({"id": "CartPole-v1", "action_names": ["left"]}, "has 1 names"),
        ({"id": "CartPole-v1", "action_names": {"left": 2}}, "'left' is 2, outside"),
        ({"id": "CartPole-v1", "action_names": ["left", "LEFT"]}, "must hold different names"),
        ({"id": "Pendulum-v1"}, "wrap the environment in an ActionWrapper"),
        ({"action_names": ["left"]}, "is for Discrete action spaces"),
        ({"render_text": "nowhere:f"}, "task.params.render_text='nowhere:f'.*cannot be imported"),
        ({"expert": "json"}, "task.params.expert='json' must have the form"),
    ],
)
def test_what_does_not_fit_is_named_before_any_episode(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**params)
