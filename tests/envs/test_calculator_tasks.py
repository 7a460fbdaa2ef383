"""The calculator task: solvable, graded rightly, disjoint splits, deterministic."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from spear_fast.envs.calculator import CalculatorEnv, CalculatorTasks
from spear_fast.envs.generators import create_generator, draw_entry, is_right
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.splits import SHARES, Split
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import ConfigError, TaskError

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "negation": {"allow_negation": True},
    "full": {"prompt_style": "full"},
    "products": {"operators": ["+", "-", "*"], "allow_negation": True, "max_terms": 5},
    "division": {"operators": ["+", "-", "*", "/"], "max_terms": 4},
    "huge": {"operators": ["*"], "max_terms": 12, "max_digits": 8},
    "binary": {"tool": "binary", "max_terms": 5},
    "binary products": {"tool": "binary", "operators": ["+", "-", "*"], "allow_negation": True, "max_terms": 5},
}


def make(seed: int = 0, **params: Any) -> CalculatorTasks:
    tasks = make_task_set("calculator", {"num_train": 400, "num_eval": 60, "num_demo": 200} | params, seed)
    assert isinstance(tasks, CalculatorTasks)
    return tasks


def questions(tasks: CalculatorTasks, split: Split) -> list[str]:
    return [tasks.problem(split, index).question for index in range(tasks.size(split))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_expert_solves_every_task(variant: str, play: Callable[..., Any]) -> None:
    tasks = make(**VARIANTS[variant])
    for split in SHARES:
        for index in range(25):
            episode = play(tasks, split, index)
            assert episode.won, episode.messages
            assert episode.rewards == [1.0]
            assert len(episode.messages) >= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_splits_are_disjoint_and_eval_is_distinct(variant: str) -> None:
    tasks = make(**VARIANTS[variant])
    pools = {split: questions(tasks, split) for split in SHARES}
    assert [len(pools[split]) for split in ("train", "eval", "demo")] == [400, 60, 200]
    assert len(set(pools["eval"])) == 60
    assert not set(pools["train"]) & set(pools["eval"])
    assert not set(pools["train"]) & set(pools["demo"])
    assert not set(pools["eval"]) & set(pools["demo"])


def test_eval_is_held_out_under_other_seeds_too() -> None:
    assert not set(questions(make(seed=1, max_digits=1), "eval")) & set(questions(make(seed=2, max_digits=1), "train"))


def test_tasks_depend_on_seed_and_index_only() -> None:
    first, second = make(), make(num_train=9, num_eval=7)
    assert questions(first, "train")[:9] == questions(second, "train")
    assert questions(first, "eval")[:7] == questions(second, "eval")
    assert questions(first, "train") != questions(make(seed=1), "train")


def test_neighbouring_seeds_share_no_stream() -> None:
    # reasoning-gym makes item i from seed + i, so that plain seeds 0 and 1 would give the same items shifted by one.
    # Questions this long repeat by chance once in 10^15 pairs or less.
    long = {"min_terms": 5, "max_terms": 6, "min_digits": 4, "max_digits": 4}
    assert not set(questions(make(seed=0, **long), "train")) & set(questions(make(seed=1, **long), "train"))


def test_binary_variant_needs_one_call_for_each_operator(play: Callable[..., Any]) -> None:
    tasks = make(tool="binary", min_terms=4)
    episode = play(tasks, "train", 0)
    assert len(episode.messages) == 4
    assert [tool.__name__ for tool in tasks.tools] == ["calculate"]


def test_expert_goes_on_after_a_strange_call(play: Callable[..., Any]) -> None:
    tasks = make()

    def policy(env: CalculatorEnv, episode: Any) -> str:
        if len(episode.messages) in (0, 2):
            return '<tool_call>{"name": "calculator", "arguments": {"expression": "1000 * 1000"}}</tool_call>'
        return env.expert()

    episode = play(tasks, "train", 0, policy)
    assert episode.won
    assert len(episode.messages) == 4


def test_demonstrations_can_be_easier() -> None:
    tasks = make(demo_max_terms=2, demo_max_digits=1, min_terms=2, max_terms=6, max_digits=3)
    for question in questions(tasks, "demo"):
        assert re.fullmatch(r"\d [+-] \d = \?", question)
    assert max(len(question) for question in questions(tasks, "train")) > 20


def test_prompt_styles() -> None:
    short, full = make().problem("train", 0), make(prompt_style="full").problem("train", 0)
    assert short.question == f"{short.expression} = ?"
    assert full.question == f"State the final answer to the following arithmetic problem: {short.expression} ="


def test_library_answers_are_those_of_the_tool() -> None:
    # Python's own evaluation, with exact whole numbers: division appears only where it leaves no rest.
    tasks = make(operators=["+", "-", "*", "/"], allow_negation=True, max_terms=6)
    for index in range(400):
        problem = tasks.problem("train", index)
        assert eval(problem.expression) == pytest.approx(int(problem.entry["answer"]), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "reward", "valid"),
    [
        ("<answer>{right}</answer>", 1.0, True),
        ("<think>x</think><answer> {right} \n</answer>", 1.0, True),
        ("<answer>{right}.0</answer>", 1.0, True),
        ("<answer>1</answer> no, <answer>{right}</answer>", 1.0, True),
        ("<answer>{right}</answer> no, <answer>0.5</answer>", 0.0, True),
        ("<answer>it is {right}</answer>", 0.0, True),
        ("<answer>{right}7</answer>", 0.0, True),
        ("<answer></answer>", 0.0, True),
        ("<answer>nan</answer>", 0.0, True),
        ("<answer>1e999999999</answer>", 0.0, True),
        ("{right}", 0.0, False),
        ("<answer>{right}", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_grading(text: str, reward: float, valid: bool) -> None:
    tasks = make()
    env = tasks.make()
    asyncio.run(env.reset(seed=0, options={"split": "train", "index": 3}))
    right = tasks.problem("train", 3).entry["answer"]
    _, got, terminated, truncated, info = asyncio.run(env.step(text.format(right=right)))
    assert (got, terminated, truncated) == (reward, True, False)
    assert info == {"won": reward == 1.0, "action_valid": valid, "answered": valid}


def test_scorer_that_raises_counts_as_wrong() -> None:
    class Broken:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            raise RuntimeError("junk")

    assert not is_right(Broken(), {}, "1")


def test_generator_that_fails_on_an_item_gives_none() -> None:
    class Dividing:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"answer": str(12 // index)}

    assert draw_entry(Dividing(), 0) is None
    assert draw_entry(Dividing(), 3) == {"answer": "4"}


def test_partial_score_counts_as_wrong() -> None:
    dataset = create_generator("chain_sum", seed=0)
    entry = dataset[0]
    assert 0 < dataset.score_answer(f"x{entry['answer']}", entry) < 1
    assert not is_right(dataset, entry, f"x{entry['answer']}")


def test_refused_settings_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"refuses 'chain_sum'.*min_terms must be positive"):
        create_generator("chain_sum", seed=0, min_terms=0)


@pytest.mark.parametrize(("tool", "names"), [("expression", ["expression"]), ("binary", ["a", "op", "b"])])
def test_tool_schema_is_that_of_an_episode(tool: str, names: list[str]) -> None:
    tasks = make(tool=tool)
    schema = tool_schema(tasks.tools[0])
    assert schema == tool_schema(tasks.make().tools[0])
    assert schema["function"]["parameters"]["required"] == names


def test_tool_error_is_readable() -> None:
    tool = make().make().tools[0]
    assert tool(expression="4 + 7 - 3") == "8"
    with pytest.raises(ValueError, match="only numbers"):
        tool(expression="__import__('os').system('true')")


def test_step_before_reset_is_an_error() -> None:
    with pytest.raises(TaskError, match="before reset"):
        asyncio.run(make().make().step("<answer>1</answer>"))
