"""Prompt files in TRL's and verl's shapes, their errors, and how completions are graded."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from spear_fast.envs.base import Demonstrator, Environment, Info, StepResult, TaskSet
from spear_fast.envs.prompts import PromptTasks
from spear_fast.envs.registry import make_task_set
from spear_fast.errors import ConfigError, MissingDependencyError, TaskError

SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = [{"prompt": f"{number} + 1 = ?", "answer": str(number + 1)} for number in range(20)]
CONVERSATION = [
    {"prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}], "solution": row["answer"]} for row in PLAIN
]
VERL = [
    {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"index": number},
    }
    for number, row in enumerate(PLAIN)
]
SHAPES = {"plain": PLAIN, "conversation": CONVERSATION, "verl": VERL}


def write(path: Path, rows: Sequence[Any]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make(**params: Any) -> PromptTasks:
    tasks = make_task_set("prompts", params, seed=0)
    assert isinstance(tasks, PromptTasks)
    return tasks


def from_rows(folder: Path, rows: Sequence[Any], **params: Any) -> PromptTasks:
    """A task set whose training rows are `rows`, in order."""
    held_out = write(folder / "held_out.jsonl", [{"prompt": "held out", "answer": "1", "ground_truth": "1"}])
    return make(train_file=write(folder / "rows.jsonl", rows), eval_file=held_out, **params)


def grade(tasks: PromptTasks, completion: str, index: int = 0, split: str = "train") -> tuple[str, Info, StepResult]:
    async def play() -> tuple[str, Info, StepResult]:
        env = tasks.make()
        observation, info = await env.reset(seed=0, options={"split": split, "index": index})
        result = await env.step(completion)
        await env.close()
        return observation, info, result

    return asyncio.run(play())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_file_type(shape: str, suffix: str, tmp_path: Path) -> None:
    rows = SHAPES[shape]
    train, held_out = write(tmp_path / f"train{suffix}", rows[:15]), write(tmp_path / f"eval{suffix}", rows[15:])
    tasks = make(train_file=train, eval_file=held_out)
    assert (tasks.size("train"), tasks.size("eval")) == (15, 5)
    for index in range(15):
        text, info, (_, reward, terminated, truncated, last) = grade(tasks, f"<answer>{index + 1}</answer>", index)
        assert text == f"{index} + 1 = ?"
        assert (reward, terminated, truncated, last.get("won")) == (1.0, True, False, True)
        assert info.get("messages") == (None if shape == "plain" else rows[index]["prompt"])
        assert info.get("task_type") == ("math" if shape == "verl" else None)
    assert grade(tasks, "no", 0)[2][1] == 0.0


def test_protocols_are_satisfied(tmp_path: Path) -> None:
    tasks = from_rows(tmp_path, PLAIN)
    assert isinstance(tasks, TaskSet)
    assert isinstance(tasks.make(), Environment)
    assert not isinstance(tasks.make(), Demonstrator)
    with pytest.raises(TaskError, match="no split 'demo'; it has train, eval"):
        tasks.size("demo")
    with pytest.raises(TaskError, match="before reset"):
        asyncio.run(tasks.make().step("1"))


def test_eval_fraction_is_disjoint_stable_and_complete(tmp_path: Path) -> None:
    # Each prompt occurs twice, with different answers: both must land on one side.
    rows = [{"prompt": f"question {number % 200}", "answer": str(number)} for number in range(400)]
    path = write(tmp_path / "all.jsonl", rows)
    tasks = make(train_file=path, eval_fraction=0.25)
    train = [tasks.row("train", index).text for index in range(tasks.size("train"))]
    held_out = [tasks.row("eval", index).text for index in range(tasks.size("eval"))]
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(row["prompt"] for row in rows)
    assert 0.15 < len(held_out) / 400 < 0.35
    fewer = make(train_file=write(tmp_path / "fewer.jsonl", rows[:100]), eval_fraction=0.25)
    assert {fewer.row("eval", index).text for index in range(fewer.size("eval"))} <= set(held_out)


def test_common_prompts_of_train_and_eval_file_are_an_error(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "train.jsonl", PLAIN), write(tmp_path / "eval.jsonl", PLAIN[7:9])
    with pytest.raises(TaskError, match=r"2 prompts are in both.*train\.jsonl line 8 and .*eval\.jsonl line 1"):
        make(train_file=train, eval_file=held_out)


@pytest.mark.parametrize("params", [{}, {"eval_fraction": 0.5, "eval_file": "b.jsonl"}])
def test_eval_must_come_from_one_place(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"either task\.params\.eval_file or task\.params\.eval_fraction"):
        make(train_file="a.jsonl", **params)


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_fraction=0\.001 leaves a split"):
        make(train_file=write(tmp_path / "a.jsonl", PLAIN), eval_fraction=0.001)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "line 2: field 'prompt' is missing; the row has question"),
        ({"prompt": "  "}, "line 2: field 'prompt' is empty"),
        ({"prompt": 3}, "line 2: field 'prompt' must be text or a list of messages, got int"),
        ({"prompt": []}, "line 2: field 'prompt' must be text or a list"),
        ({"prompt": ["hi"]}, r"line 2: field 'prompt\[0\]' must be an object"),
        ({"prompt": [SYSTEM, {"role": "human", "content": "x"}]}, r"field 'prompt\[1\]\.role' is 'human'; use one of"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, r"field 'prompt\[0\]\.content' must be text"),
        ({"prompt": [SYSTEM]}, "line 2: field 'prompt' must end with a user message, it ends with 'system'"),
        ({"prompt": "x", "reward_model": {"style": "rule"}}, "line 2: field 'reward_model' must be an object with"),
        ({"prompt": "x", "reward_model": "rule"}, "line 2: field 'reward_model' must be"),
        ({"prompt": "x", "level": 3}, "line 2: field 'ground_truth' is missing, reward 'exact_match' needs it.*level"),
        (["x"], "line 2: expected an object with the field 'prompt', got list"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        from_rows(tmp_path, [PLAIN[0], row])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": x}\n', r"a\.jsonl line 3: not valid JSON .*column"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '{"prompt": "x"}', "holds a JSON dict; it must hold a list"),
        ("a.json", "[", "not valid JSON"),
        ("a.csv", "prompt\nx\n", r"unknown type; use \.jsonl, \.json or \.parquet"),
        ("a.parquet", "no parquet", "is not a parquet file"),
        ("a.jsonl", None, "does not exist"),
        ("a.parquet", None, "does not exist"),
    ],
)
def test_bad_files_are_named(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        make(train_file=str(path), eval_fraction=0.5)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(TaskError, match="cannot be read"):
        make(train_file=str(path), eval_fraction=0.5)


def test_line_separators_within_a_prompt_are_kept(tmp_path: Path) -> None:
    tasks = from_rows(tmp_path, [{"prompt": "one\u2028two\x85three", "answer": "1"}])
    assert tasks.row("train", 0).text == "one\u2028two\x85three"


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", PLAIN)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[envs\]"):
        make(train_file=path, eval_fraction=0.5)


REWARDS = """
from __future__ import annotations
import asyncio
from dataclasses import dataclass

@dataclass
class Settings:
    weight: float = 0.5

def everything(completion, **columns):
    assert set(columns) == {"answer", "ground_truth", "level"}, columns
    return columns["level"]

def some(completion: str, answer: str, missing: int = 4) -> float:
    return Settings().weight * (completion == answer) + missing

async def slow(completion, answer):
    await asyncio.sleep(0)
    return completion == answer

def needs_more(completion, rubric): return 1.0
def raises(completion, **columns): raise KeyError("lost")
def nothing(completion, **columns): return None
def infinite(completion, **columns): return float("inf")
def batched(completions, **columns): return [1.0]
number = 3
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("function", "completion", "reward"),
    [("everything", "x", 0.25), ("some", "5", 4.5), ("some", "6", 4.0), ("slow", "5", 1.0), ("slow", "6", 0.0)],
)
def test_own_reward_from_a_file(
    function: str, completion: str, reward: float, rewards_file: str, tmp_path: Path
) -> None:
    rows = [{"prompt": "x", "answer": "5", "level": 0.25}]
    tasks = make(
        train_file=write(tmp_path / "train.jsonl", rows),
        eval_file=write(tmp_path / "eval.jsonl", [rows[0] | {"prompt": "y"}]),
        reward=f"{rewards_file}:{function}",
        success_reward=4.5,
    )
    _, _, (_, got, _, _, info) = grade(tasks, completion)
    assert got == reward
    assert info.get("won") == (reward >= 4.5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "failed on .*rows.jsonl line 1: KeyError"),
        ("nothing", "failed on .*TypeError"),
        ("batched", "failed on .*TypeError"),
        ("infinite", "gave inf on .*rows.jsonl line 1"),
    ],
)
def test_failing_reward_is_a_task_error(function: str, message: str, rewards_file: str, tmp_path: Path) -> None:
    tasks = from_rows(tmp_path, PLAIN, reward=f"{rewards_file}:{function}")
    with pytest.raises(TaskError, match=message):
        grade(tasks, "1")


def test_column_that_the_reward_needs_is_checked_at_the_start(rewards_file: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"line 1: field 'rubric' is missing, reward '.*needs_more' needs it"):
        from_rows(tmp_path, PLAIN, reward=f"{rewards_file}:needs_more")


def test_own_reward_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_package.py").write_text("def always(completion, **columns):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks = from_rows(tmp_path, PLAIN, reward="my_reward_package:always")
    assert grade(tasks, "")[2][1] == 1.0


def test_two_reward_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    rewards = []
    for value in (0.25, 0.75):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "reward.py").write_text(f"def constant(completion, **columns):\n    return {value}\n")
        rewards.append(grade(from_rows(folder, PLAIN, reward=f"{folder / 'reward.py'}:constant"), "")[2][1])
    assert rewards == [0.25, 0.75]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exactmatch", "'exactmatch' is unknown; the nearest is 'exact_match'"),
        ("no_such_module:f", "'no_such_module' cannot be imported"),
        ("nowhere/rewards.py:f", "file nowhere/rewards.py does not exist"),
        ("{file}:lost", "has no function 'lost'"),
        ("{file}:number", "has no function 'number'"),
        ("{broken}:f", "raised ZeroDivisionError.* when loaded"),
    ],
)
def test_unknown_reward_is_a_config_error(reward: str, message: str, rewards_file: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        from_rows(tmp_path, PLAIN, reward=reward.format(file=rewards_file, broken=broken))
