"""Task sets by name, their parameters checked, and no library imported that a run does not use."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from spear_fast.config.schema import Section
from spear_fast.envs import registry
from spear_fast.envs.base import Demonstrator, Environment, TaskSet
from spear_fast.envs.calculator import CalculatorTasks
from spear_fast.envs.registry import available, make_task_set, register
from spear_fast.errors import ConfigError, MissingDependencyError


class EchoTasks:
    """A task set as a user would write it; it is never played here."""

    class Params(BaseModel):
        model_config = ConfigDict(extra="forbid")

    name = "echo"
    system_prompt = ""
    tools: Sequence[Any] = ()

    def __init__(self, params: Params, seed: int) -> None:
        self.seed = seed

    def size(self, split: str) -> int:
        return 1

    def make(self) -> Environment:
        raise NotImplementedError


@pytest.fixture
def echo_registered() -> Iterator[None]:
    register("echo")(EchoTasks)
    yield
    registry._registered.pop("echo")


@pytest.mark.parametrize("name", ["calculator", "treasure"])
def test_protocols_are_satisfied(name: str) -> None:
    tasks = make_task_set(name, {"num_eval": 4}, seed=0)
    assert isinstance(tasks, TaskSet)
    assert isinstance(tasks.make(), Environment)
    assert isinstance(tasks.make(), Demonstrator)
    assert tasks.size("eval") == 4


def test_built_in_names_are_available() -> None:
    names = [
        "alfworld",
        "babyai",
        "calculator",
        "gymnasium",
        "math",
        "openenv",
        "prompts",
        "shopping",
        "sokoban",
        "treasure",
        "trl",
        "verifiers",
    ]
    assert available() == names


@pytest.mark.usefixtures("echo_registered")
def test_registered_class_is_found() -> None:
    assert "echo" in available()
    tasks = make_task_set("echo", {}, seed=7)
    assert isinstance(tasks, EchoTasks)
    assert tasks.seed == 7
    with pytest.raises(ConfigError, match=r"unknown key 'task\.params\.size'; this task has no parameters"):
        make_task_set("echo", {"size": 1}, seed=0)


@pytest.mark.usefixtures("echo_registered")
def test_taken_name_is_an_error_but_a_repeat_is_not() -> None:
    register("echo")(EchoTasks)
    for name in ("echo", "calculator"):
        with pytest.raises(ConfigError, match=f"'{name}' is already taken"):
            register(name)(type("Other", (EchoTasks,), {}))


def test_class_by_module_path() -> None:
    tasks = make_task_set("spear_fast.envs.calculator:CalculatorTasks", {"num_eval": 1}, seed=0)
    assert isinstance(tasks, CalculatorTasks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("calculater", r"task\.name='calculater' is unknown; the nearest is 'calculator'"),
        ("no_such_package.task:Tasks", "module 'no_such_package.task' cannot be imported"),
        ("spear_fast.envs.calculator:Tasks", "has no class 'Tasks'"),
        ("spear_fast.envs.base:Environment", "has no pydantic model `Params`"),
    ],
)
def test_unknown_name_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task_set(name, {}, seed=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_term": 3}, r"unknown key 'task\.params\.max_term'; the nearest valid key is 'task\.params\.max_terms'"),
        ({"max_terms": "3"}, r"task\.params\.max_terms='3': input should be a valid integer"),
        ({"max_terms": 1}, r"task\.params\.max_terms=1: input should be greater than or equal to 2"),
        ({"operators": ["+", "%"]}, r"task\.params\.operators\.1='%': input should be '\+', '-', '\*' or '/'"),
        ({"min_terms": 4, "max_terms": 3}, r"task\.params\.max_terms=3 is below min_terms=4"),
        ({"min_terms": 3, "demo_max_terms": 2}, r"task\.params\.demo_max_terms=2 is below min_terms=3"),
        ({"min_digits": 3}, r"task\.params\.max_digits=2 is below min_digits=3"),
        ({"tool": "binary", "operators": ["+", "/"]}, "which tool=binary lacks"),
        ({"max_digits": 8, "operators": ["/"]}, "limit with the operator '/'"),
        ({"min_terms": 2, "max_terms": 2, "max_digits": 1}, r"task\.params\.num_eval=256: only \d+ different"),
    ],
)
def test_wrong_calculator_params(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task_set("calculator", params, seed=0)


def test_all_wrong_params_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        make_task_set("treasure", {"num_rooms": 99, "rooms": 3}, seed=0)
    assert "task.params.num_rooms=99" in str(caught.value)
    assert "'task.params.rooms'" in str(caught.value)


def test_missing_param_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task\.params\.train_file is missing; set it"):
        make_task_set("prompts", {}, seed=0)


def test_every_param_is_documented() -> None:
    for name in available():
        model = registry.task_set_class(name).Params
        assert issubclass(model, Section)
        assert all(field.description for field in model.model_fields.values()), name


def test_registry_imports_no_task_library() -> None:
    code = (
        "import sys, spear_fast.envs.registry as r; r.available(); heavy = "
        "{'reasoning_gym', 'pyarrow', 'torch', 'spear_fast.envs.calculator'}; print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_reasoning_gym_leaves_the_global_generator_alone() -> None:
    # A fresh interpreter, because the import itself is what draws from the generator.
    code = (
        "import asyncio, random; from spear_fast.envs.registry import make_task_set; random.seed(5); "
        "tasks = make_task_set('calculator', {'num_eval': 8, 'operators': ['+', '*']}, 0); env = tasks.make(); "
        "asyncio.run(env.reset(seed=0, options={'split': 'train', 'index': 3})); "
        "asyncio.run(env.step('<answer>1</answer>')); print(random.random())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == random.Random(5).random()


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[envs\]"):
        make_task_set("calculator", {}, seed=0)
