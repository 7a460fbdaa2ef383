"""Task sets by name: built-in, registered, or `module:Class`; their parameters are checked here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from spear_fast.config.nearest import nearest_key
from spear_fast.errors import ConfigError

from .base import TaskSet

BUILT_IN = {
    "alfworld": "spear_fast.envs.alfworld:AlfworldTasks",
    "babyai": "spear_fast.envs.babyai:BabyAITasks",
    "calculator": "spear_fast.envs.calculator:CalculatorTasks",
    "gymnasium": "spear_fast.envs.adapters.gymnasium:GymnasiumTasks",
    "math": "spear_fast.envs.math:MathTasks",
    "openenv": "spear_fast.envs.adapters.openenv:OpenEnvTasks",
    "prompts": "spear_fast.envs.prompts:PromptTasks",
    "shopping": "spear_fast.envs.shopping:ShoppingTasks",
    "sokoban": "spear_fast.envs.sokoban:SokobanTasks",
    "treasure": "spear_fast.envs.treasure:TreasureTasks",
    "trl": "spear_fast.envs.adapters.trl:TrlTasks",
    "verifiers": "spear_fast.envs.adapters.verifiers:VerifiersTasks",
}
"""Where the built-in task sets live. Strings, so that a run imports only the one it uses."""


class TaskSetClass(Protocol):
    """What can be registered: a class with a strict pydantic `Params`, built from it and a seed."""

    Params: type[BaseModel]

    def __call__(self, params: Any, seed: int) -> TaskSet: ...


Registered = TypeVar("Registered", bound=TaskSetClass)
_registered: dict[str, TaskSetClass] = {}


def register(name: str) -> Callable[[Registered], Registered]:
    """Return a class decorator that makes the task set available as `task.name: <name>`.

    Raises ConfigError if the name is taken by another class.
    """

    def add(task_set_class: Registered) -> Registered:
        if name in BUILT_IN or _registered.get(name, task_set_class) is not task_set_class:
            raise ConfigError(f"task set name {name!r} is already taken; register it under another name")
        _registered[name] = task_set_class
        return task_set_class

    return add


def available() -> list[str]:
    """Return the known names, sorted."""
    return sorted({*BUILT_IN, *_registered})


def task_set_class(name: str) -> TaskSetClass:
    """Return the class behind a known name or a `package.module:Class` string.

    Raises ConfigError naming the nearest known name, or what could not be imported.
    """
    if name in _registered:
        return _registered[name]
    location = BUILT_IN.get(name, name)
    if ":" not in location:
        raise ConfigError(
            f"task.name={name!r} is unknown; the nearest is {nearest_key(name, available())!r} "
            f"(known: {', '.join(available())}; your own: package.module:Class)"
        )
    found = _import_attribute(name, location)
    params = getattr(found, "Params", None)
    if not (isinstance(params, type) and issubclass(params, BaseModel)):
        raise ConfigError(
            f"task.name={name!r}: {location} has no pydantic model `Params`; declare one inside the class"
        )
    return found


def make_task_set(name: str, params: Mapping[str, Any], seed: int) -> TaskSet:
    """Return task set `name` with `params` checked by its own `Params` model.

    `seed` decides which problems are drawn. Raises ConfigError listing every wrong parameter as `task.params.<key>`.
    """
    return task_set_class(name)(checked_params(name, params), seed)


def checked_params(name: str, params: Mapping[str, Any]) -> BaseModel:
    """Return `params` as the `Params` of task set `name`. Raises ConfigError like `make_task_set`."""
    model = task_set_class(name).Params
    try:
        return model.model_validate(dict(params))
    except ValidationError as error:
        problems = [_sentence(dict(detail), model) for detail in error.errors()]
        raise ConfigError(f"task {name!r}:\n" + "\n".join(f"  - {problem}" for problem in problems)) from error


def _import_attribute(name: str, location: str) -> Any:
    module_name, _, attribute = location.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"task.name={name!r}: module {module_name!r} cannot be imported ({error}); install it or set PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"task.name={name!r}: module {module_name!r} has no class {attribute!r}")
    return getattr(module, attribute)


def _sentence(detail: dict[str, Any], model: type[BaseModel]) -> str:
    """One finding of pydantic as key, value and remedy."""
    key = ".".join(["task.params", *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        if not model.model_fields:
            return f"unknown key {key!r}; this task has no parameters: remove it"
        nearest = nearest_key(key, [f"task.params.{field}" for field in model.model_fields])
        return f"unknown key {key!r}; the nearest valid key is {nearest!r}: rename or remove it"
    if detail["type"] == "missing":
        return f"{key} is missing; set it"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key}={detail['input']!r}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
