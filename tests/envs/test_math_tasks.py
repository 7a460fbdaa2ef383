"""The math task set: problems, splits, rewards, and whole trajectories with code in the real sandbox."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.prompts import make_task
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.base import Closable, Demonstrator, Environment, TaskSet
from spear_fast.envs.math import MathTasks
from spear_fast.envs.math.params import INSTRUCTIONS
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.splits import SHARES
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import ConfigError, TaskError
from spear_fast.losses.filters import mark_filtered
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.demos import demonstrate
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Trajectory
from tests.rollout.test_episode import LIMITS

FAST_SANDBOX = {"preload": ["math"], "workers": 2}


def make(seed: int = 0, **params: Any) -> MathTasks:
    """A set without a tool unless told otherwise; nothing of it needs to be closed as long as nothing is checked."""
    source = {} if "train_file" in params else {"generators": ["chain_sum"], "num_eval": 20}
    tasks = make_task_set("math", {"tool": "none", "check_timeout_s": 60.0} | source | params, seed)
    assert isinstance(tasks, MathTasks)
    return tasks


@pytest.fixture(scope="module")
def tool_tasks() -> Iterator[MathTasks]:
    tasks = make(tool="code_interpreter", sandbox=FAST_SANDBOX, generators=["chain_sum", {"gcd": {"max_numbers": 2}}])
    yield tasks
    tasks.close()


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


def gsm8k(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1?", "answer": f"Add one.\n#### {n + 1}"} for n in range(first, first + count)]


def two_files(folder: Path, record: dict[str, Any], **params: Any) -> MathTasks:
    """A set whose training problem 0 is `record`."""
    held_out = write(folder / "eval.jsonl", gsm8k(2))
    return make(train_file=write(folder / "train.jsonl", [record]), eval_file=held_out, **params)


def step(tasks: MathTasks, text: str, split: str = "train", index: int = 0) -> Any:
    env = tasks.make()
    asyncio.run(env.reset(seed=0, options={"split": split, "index": index}))
    return asyncio.run(env.step(text))


def test_protocols_are_satisfied(tool_tasks: MathTasks) -> None:
    assert isinstance(tool_tasks, TaskSet)
    assert isinstance(tool_tasks, Closable)
    assert isinstance(tool_tasks.make(), Environment)
    assert isinstance(tool_tasks.make(), Demonstrator)
    schema = tool_schema(tool_tasks.make().tools[0])["function"]
    assert (schema["name"], schema["parameters"]["required"]) == ("code_interpreter", ["code"])


def test_generated_splits_are_disjoint_and_mix_the_generators() -> None:
    tasks = make(generators=["chain_sum", "lcm"], num_train=200, num_eval=40, num_demo=60)
    problems = {split: [tasks.problem(split, index) for index in range(tasks.size(split))] for split in SHARES}
    questions = {split: {problem.question for problem in problems[split]} for split in SHARES}
    assert [len(problems[split]) for split in ("train", "eval", "demo")] == [200, 40, 60]
    assert len(questions["eval"]) == 40
    assert not questions["train"] & questions["eval"]
    assert not questions["train"] & questions["demo"]
    assert not questions["eval"] & questions["demo"]
    for split in SHARES:
        assert {problem.task_type for problem in problems[split]} == {"chain_sum", "lcm"}
    assert 80 < sum(problem.task_type == "lcm" for problem in problems["train"]) < 120


def test_generated_problems_depend_on_seed_and_index_only() -> None:
    first, second, other = make(), make(num_train=9), make(seed=1)
    assert [first.problem("train", index) for index in range(9)] == [second.problem("train", i) for i in range(9)]
    assert [first.problem("train", index) for index in range(9)] != [other.problem("train", i) for i in range(9)]


def test_file_splits_share_no_problem(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", gsm8k(60))
    tasks = make(train_file=train, eval_fraction=0.3)
    sizes = tasks.size("train"), tasks.size("eval")
    questions = [tasks.problem(split, i).question for split in ("train", "eval") for i in range(tasks.size(split))]
    assert sum(sizes) == len(set(questions)) == 60
    with pytest.raises(TaskError, match="no split 'demo'"):
        tasks.size("demo")
    # The same question in another data set's columns is the same problem.
    row = {"prompt": [{"role": "user", "content": "3 + 1?"}], "reward_model": {"ground_truth": "4"}}
    with pytest.raises(TaskError, match="1 prompts are in both"):
        make(train_file=train, eval_file=write(tmp_path / "eval.jsonl", [row]))


def test_parquet_and_a_conversation(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}
    rows = [
        {"prompt": [system, user], "reward_model": {"ground_truth": "2"}, "data_source": "math_dapo"},
        {"prompt": [user, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2 + 2?"}]}
        | {"reward_model": {"ground_truth": "4"}, "data_source": "math_dapo"},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "train.parquet")
    tasks = make(
        train_file=str(tmp_path / "train.parquet"),
        eval_file=write(tmp_path / "eval.jsonl", gsm8k(2)),
        system_prompt="Think.",
        instruction="Box it.",
    )
    options = [{"split": "train", "index": index} for index in range(2)]
    infos = [asyncio.run(tasks.make().reset(seed=0, options=each))[1] for each in options]
    openings = [info.get("messages") or [] for info in infos]
    assert openings[0] == [system, {"role": "user", "content": "1 + 1?\n\nBox it."}]
    assert infos[0].get("task_type") == "math_dapo"
    assert [message["role"] for message in openings[1]] == ["system", "user", "assistant", "user"]
    assert openings[1][0]["content"] == "Think."
    assert step(tasks, r"\boxed{2}")[1] == 1.0


@pytest.mark.parametrize(
    ("text", "reward", "answered"),
    [
        (r"\boxed{1,001}", 1.0, True),
        (r"<think>\boxed{2}</think>\boxed{1001.0}", 1.0, True),
        (r"\boxed{1002}", -1.0, True),
        (r"\boxed{" + "1001".zfill(1000) + "}", 1.0, True),
        (r"\boxed{" + "1001".zfill(1001) + "}", -1.0, True),
        ("It is 1001.", -1.0, False),
        (r"<think>\boxed{1001}</think>", -1.0, False),
        (r"\boxed{}", -1.0, False),
        ("", -1.0, False),
    ],
)
def test_reward_of_numbers(tmp_path: Path, text: str, reward: float, answered: bool) -> None:
    tasks = two_files(tmp_path, {"question": "1000 + 1?", "answer": "#### 1001"})
    observation, got, terminated, truncated, info = step(tasks, text)
    assert (observation, got, terminated, truncated) == ("", reward, True, False)
    assert info == {"won": reward > 0, "action_valid": answered, "answered": answered}


def test_symbolic_answers_of_files_go_to_math_verify_for_a_limited_time(tmp_path: Path) -> None:
    record = {"Problem": "Half of one?", "Answer": r"\frac{1}{2}"}
    tasks = two_files(tmp_path, record, reward_correct=3.0, reward_wrong=0.5, check_timeout_s=2.0, check_workers=1)
    assert step(tasks, r"\boxed{0.5}")[1] == 3.0
    assert step(tasks, r"\boxed{x/2}")[1] == 0.5
    observation, reward, *_, info = step(tasks, r"\boxed{9^{9^{9^{9}}}}")
    tasks.close()
    assert (observation, reward) == ("The check of the answer timed out.", 0.5)
    assert info == {"won": False, "action_valid": True, "answered": True}


def test_demonstrations_compute_in_the_sandbox_or_answer_at_once(tool_tasks: MathTasks) -> None:
    for messages in demonstrate(tool_tasks, 6, max_turns=3, seed=0):
        question, call, result, answer = (message["content"] for message in messages)
        assert INSTRUCTIONS["code_interpreter"] in question
        assert '"code_interpreter"' in call
        assert answer.endswith(f"\\boxed{{{result}}}")
    plain = make(demo_tool_share=0.0)
    assert [len(messages) for messages in demonstrate(plain, 3, max_turns=1, seed=0)] == [2, 2, 2]


def test_share_of_demonstrations_with_the_tool() -> None:
    tasks = make(tool="code_interpreter", demo_tool_share=0.3, sandbox=FAST_SANDBOX)
    codes = [tasks.demo_code(tasks.problem("demo", index)) for index in range(300)]
    assert 60 < sum(code is not None for code in codes) < 120
    tasks.close()


def test_files_have_no_expert(tmp_path: Path) -> None:
    tasks = make(train_file=write(tmp_path / "a.jsonl", gsm8k(9)), eval_fraction=0.5)
    with pytest.raises(TaskError, match=r"no demonstrations of problems from files; set cold_start\.steps=0"):
        demonstrate(tasks, 1, max_turns=2, seed=0)


def call(code: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}</tool_call>"


@pytest.fixture(scope="module")
def chat(tool_tasks: MathTasks) -> Chat:
    return Chat(
        train_tokenizer(["user assistant tool code print 0123456789"] * 9, 290), [tool_schema(tool_tasks.tools[0])]
    )


def collect(tasks: MathTasks, chat: Chat, scripts: list[list[str]], max_turns: int) -> list[Trajectory]:
    """One trajectory for each script, all of training problem 0, filtered as Dr.BoT does."""
    said = [iter(script) for script in scripts]
    engine = ScriptedEngine(lambda request: chat.message(next(said[request.uid])))
    limits = replace(LIMITS, max_turns=max_turns, max_turn_tokens=4096, max_tokens=1 << 16, tool_timeout_s=60.0)
    collector = Collector(tasks, engine, chat, limits, max_concurrent=16, seed=0)
    try:
        collection = collector.collect([make_task("math", "train", 0, 0)], len(scripts), tag="t")
    finally:
        collector.close()
    mark_filtered(
        collection.groups, overlong=True, incomplete=True, repetitive=False, unreadable=True, ngram=20, max_repeats=10
    )
    return collection.groups[0].trajectories


def test_trajectories_with_the_real_sandbox(tool_tasks: MathTasks, chat: Chat) -> None:
    right, wrong = f"\\boxed{{{tool_tasks.problem('train', 0).answer}}}", r"\boxed{0.5}"
    scripts = [
        [call("print(6 * 7)"), right],
        [right],
        [call("print(1 / 0)"), call("print('again')"), wrong],
        [call("print(1)"), "I give up."],
        [call(f"print({right!r})"), f"<think>{right}</think>"],
        [call("print(1)"), call("print(2)"), call("print(3)")],
        ["I give up."],
    ]
    solved, at_once, mistaken, silent, thinking, endless, idle = collect(tool_tasks, chat, scripts, max_turns=3)
    results = [[m["content"] for m in t.messages if m["role"] == "tool"] for t in (solved, mistaken, endless)]
    assert results[0] == ["42"]
    assert "ZeroDivisionError" in results[1][0]
    assert results[2][:2] == ["1", "2"]
    assert [t.num_tool_calls for t in (solved, at_once, mistaken, endless)] == [1, 0, 2, 3]

    def outcome(trajectory: Trajectory) -> tuple[Any, ...]:
        return trajectory.outcome_reward, trajectory.success, trajectory.answered, trajectory.filtered

    assert outcome(solved) == outcome(at_once) == (1.0, True, True, None)
    assert outcome(mistaken) == (-1.0, False, True, None)
    # A call but no answer is a negative sample; neither is an incomplete one.
    assert outcome(silent) == outcome(thinking) == (-1.0, False, False, None)
    assert outcome(idle) == (-1.0, False, False, "incomplete")
    # Nor does it pay to go on until the limit of turns.
    assert outcome(endless) == (-1.0, False, False, None)
    assert endless.turns[-1].reward == -1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"set either task\.params\.generators .* or task\.params\.train_file"),
        ({"generators": ["lcm"], "train_file": "x.jsonl"}, "only one of them"),
        ({"train_file": "x.jsonl"}, r"set either task\.params\.eval_file or task\.params\.eval_fraction"),
        ({"generators": ["lcm"], "eval_fraction": 0.5}, "eval_fraction belong to train_file"),
        ({"generators": [{"lcm": {}, "gcd": {}}]}, "a name or one pair of name and settings"),
        ({"generators": ["lcm"], "reward_wrong": 1.0}, "reward_correct=1 must be above reward_wrong=1"),
        ({"generators": ["lcmm"]}, "reasoning-gym refuses 'lcmm'"),
        ({"generators": [{"chain_sum": {"min_terms": 0}}]}, "refuses 'chain_sum'.*min_terms must be positive"),
        ({"generators": [{"gcd": {"max_number": 0}}]}, "unknown key|unexpected keyword"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task_set("math", {"tool": "none"} | params, 0)


def test_long_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"train\.jsonl line 1: the right answer has 30 characters.*max_answer_chars=20"
    ):
        two_files(tmp_path, {"question": "Many?", "answer": "1" * 30}, max_answer_chars=20)


def test_use_before_reset_is_an_error() -> None:
    with pytest.raises(TaskError, match="before reset"):
        asyncio.run(make().make().step(r"\boxed{1}"))
