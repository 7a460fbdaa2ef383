"""What is written for TRL's GRPOTrainer, as tasks, held against the real trainer."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spear_fast.envs.adapters.trl import TrlTasks
from spear_fast.envs.base import Info
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import ConfigError, TaskError
from tests.environments_page import call, play

HERE = "tests.envs.test_adapter_trl"


class Counter:
    """An environment as TRL documents it."""

    made: ClassVar[int] = 0

    def __init__(self) -> None:
        Counter.made += 1

    def reset(self, goal: int, prompt: Any, **row: Any) -> str | None:
        self.goal, self.count, self.prompt = goal, 0, prompt
        return f" Reach {goal}." if goal else None

    def increment(self, step: int) -> int:
        """Add to the counter.

        Args:
            step: How much.

        Returns:
            The counter.
        """
        if step < 0:
            raise ValueError("only upwards")
        self.count += step
        return self.count

    async def get_reward(self) -> float:
        return float(self.count == self.goal)

    def _hidden(self) -> None:
        pass


def goal_reached(environments: list[Any], goal: list[int], **columns: Any) -> list[float]:
    return [0.5 * (each.count == wanted) for each, wanted in zip(environments, goal, strict=True)]


def seen(prompts: list[Any], completions: list[Any], log_metric: Any, **columns: Any) -> list[float | None]:
    log_metric("calls", 1.0)
    kept.append((prompts, completions, columns))
    return [None]


async def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(each)) for each in completions]


def needs_ids(completions: list[Any], completion_ids: list[Any]) -> list[float]:
    return [0.0]


def needs_colour(completions: list[Any], colour: list[str]) -> list[float]:
    return [0.0]


def silent(completions: list[Any]) -> list[float | None]:
    return [None]


kept: list[Any] = []


def make(folder: Path, conversation: bool = True, **params: Any) -> TrlTasks:
    rows = []
    for goal in range(12):
        text = "Count." if "environment" in params else f"Count {goal}."
        rows.append(json.dumps({"prompt": [{"role": "user", "content": text}] if conversation else text, "goal": goal}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    tasks = make_task_set("trl", {"train_file": str(folder / "rows.jsonl"), "eval_fraction": 0.4, **params}, 0)
    assert isinstance(tasks, TrlTasks)
    return tasks


def solve(messages: list[dict[str, Any]]) -> str:
    if messages[-1]["role"] == "tool":
        return "Done."
    return call("increment", step=int(messages[0]["content"].rstrip(".").split()[-1]))


def index_of(tasks: TrlTasks, goal: int) -> tuple[str, int]:
    return next(
        (split, index)
        for split in ("train", "eval")
        for index in range(tasks.size(split))
        if tasks.row(split, index).columns["goal"] == goal
    )


def test_an_environment_owns_tools_and_reward(tmp_path: Path) -> None:
    tasks = make(tmp_path, environment=f"{HERE}:Counter", rewards=[f"{HERE}:goal_reached"], reward_weights=[2.0])
    assert [tool.__name__ for tool in tasks.tools] == ["increment"]
    split, index = index_of(tasks, 3)
    won = play(tasks, solve, split, index)
    assert (won.error, won.outcome_reward, won.num_valid_tool_calls) == (None, 2 * 0.5 + 1.0, 1)
    assert won.messages[0] == {"role": "user", "content": "Count. Reach 3."}
    lost = play(tasks, lambda _: "Nothing.", split, index)
    assert (lost.error, lost.outcome_reward, lost.success) == (None, 0.0, False)
    wrong = play(tasks, lambda each: "No." if each[-1]["role"] == "tool" else call("increment", step=-1), split, index)
    assert wrong.messages[-2]["content"] == "Error: only upwards" and wrong.num_valid_tool_calls == 0


def test_an_episode_that_a_limit_ends_is_scored_as_far_as_it_came(tmp_path: Path) -> None:
    tasks = make(tmp_path, environment=f"{HERE}:Counter", rewards=[f"{HERE}:goal_reached"], reward_weights=[2.0])
    split, index = index_of(tasks, 3)

    async def cut_off() -> tuple[float, Info]:
        env = tasks.make()
        await env.reset(seed=0, options={"split": split, "index": index})
        for _ in range(3):
            await env.tools[0](step=1) if inspect.iscoroutinefunction(env.tools[0]) else env.tools[0](step=1)
        return await env.finish(None)

    reward, info = asyncio.run(cut_off())
    assert reward == 2 * 0.5 + 1.0 and info.get("won") and "answered" not in info


def test_rows_with_equal_prompts_are_different_tasks_and_environments_are_reused(tmp_path: Path) -> None:
    tasks = make(tmp_path, environment=f"{HERE}:Counter")
    goals = [
        {tasks.row(split, index).columns["goal"] for index in range(tasks.size(split))} for split in ("train", "eval")
    ]
    assert all(goals) and not goals[0] & goals[1] and goals[0] | goals[1] == set(range(12))
    first = tasks.take()
    tasks.give_back(first)
    for _ in range(3):
        play(tasks, lambda _: "")
    assert tasks.take() is first


def test_reward_functions_read_the_conversation(tmp_path: Path) -> None:
    import tests.envs.test_adapter_trl as found  # pyright: ignore[reportMissingImports]

    tasks = make(tmp_path, environment=f"{HERE}:Counter", rewards=[f"{HERE}:seen", f"{HERE}:length"])
    played = play(tasks, solve, *index_of(tasks, 5))
    assert played.outcome_reward == 3.0 + 1.0
    prompts, completions, columns = found.kept.pop()
    assert prompts == [[{"role": "user", "content": "Count. Reach 5."}]]
    function = {"name": "increment", "arguments": {"step": 5}}
    assert completions == [
        [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "name": "increment", "content": "5"},
            {"role": "assistant", "content": "Done."},
        ]
    ]
    assert columns["goal"] == [5] and len(columns["environments"]) == 1


def test_plain_prompts_without_tools_give_plain_text(tmp_path: Path) -> None:
    tasks = make(tmp_path, conversation=False, rewards=[f"{HERE}:length"])
    assert play(tasks, lambda _: "four").outcome_reward == 4.0


def test_rewards_that_trl_ships(tmp_path: Path) -> None:
    tasks = make(tmp_path, rewards=["trl.rewards:think_format_reward"])
    assert play(tasks, lambda _: "<think>a</think>b").success
    assert not play(tasks, lambda _: "b").success


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ConfigError, "rewards is empty"),
        ({"rewards": [f"{HERE}:needs_ids"]}, ConfigError, "needs 'completion_ids'"),
        ({"rewards": [f"{HERE}:needs_colour"]}, TaskError, r"line \d+: field .colour. is missing"),
        ({"rewards": [f"{HERE}:length"], "reward_weights": []}, ConfigError, "0 numbers for 1 rewards"),
        ({"environment": "json:JSONDecoder"}, ConfigError, "JSONDecoder has no method reset"),
        ({"rewards": [f"{HERE}:length"], "tools": ["json:dumps"]}, TaskError, "tool 'dumps'"),
        ({"rewards": ["json:nothing"]}, ConfigError, "rewards='json:nothing'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, params: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path, **params)


def test_no_reward_at_all_is_an_error_of_the_trajectory(tmp_path: Path) -> None:
    assert "is None" in str(play(make(tmp_path, rewards=[f"{HERE}:silent"]), lambda _: "").error)


def test_the_schema_is_what_trl_shows() -> None:
    from transformers.utils import get_json_schema

    theirs = get_json_schema(Counter().increment)
    theirs["function"].pop("return", None)
    assert tool_schema(Counter().increment) == theirs


def test_the_real_trainer_finds_the_same_tools_and_rewards(tmp_path: Path) -> None:
    from tests.integrations.trl_toys import settings, tiny_model, tiny_tokenizer  # isort: skip
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tasks = make(tmp_path, environment=f"{HERE}:Counter", rewards=[f"{HERE}:goal_reached"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = qwen_template()
    model = tiny_model(max_position_embeddings=2048)
    args = GRPOConfig(**settings(tmp_path / "run", max_steps=1))
    trainer = GRPOTrainer(
        model, goal_reached, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        environment_factory=Counter,
    )  # fmt: skip
    assert [tool.__name__ for tool in trainer.tools] == [tool.__name__ for tool in tasks.tools]
    environment = Counter()
    environment.reset(**rows[3])
    environment.increment(3)
    trainer.environments = [environment]
    completion = [{"role": "assistant", "content": "Done."}]
    rewards = [fn(environments=[environment], goal=[3], completions=[completion]) for fn in trainer.reward_funcs[:1]]
    played = play(tasks, solve, *index_of(tasks, 3))
    assert len(trainer.reward_funcs) == 2 and rewards == [[0.5]]
    assert played.outcome_reward == rewards[0][0] + 1.0


def qwen_template() -> str:
    from trl.chat_template_utils import qwen3_chat_template

    return qwen3_chat_template
