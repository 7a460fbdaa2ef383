"""Reward functions of prompt sets: the built-in ones, and a user's own by module or file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from spear_fast.config.nearest import nearest_key
from spear_fast.errors import ConfigError

from .text import tagged

RewardFunction = Callable[..., Any]
"""`reward(completion, **columns) -> float`, sync or async. It receives the columns it has parameters for."""

# A sign after a digit or a closing parenthesis is an operator.
_NUMBER = re.compile(r"(?:(?<![\d)])[-+])?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def exact_match(completion: str, ground_truth: Any) -> float:
    """Return 1 if the final answer is the reference up to surrounding white space, else 0."""
    return float(final_answer(completion) == _reference_answer(ground_truth))


def numeric_match(completion: str, ground_truth: Any) -> float:
    """Return 1 if the last number of the final answer equals that of the reference, else 0.

    Thousands separators and trailing zeros do not matter.
    """
    expected = _last_number(_reference_answer(ground_truth))
    if expected is None:
        raise ValueError(f"the reference {ground_truth!r} holds no number; use the reward exact_match")
    return float(_last_number(final_answer(completion)) == expected)


BUILT_IN: dict[str, RewardFunction] = {"exact_match": exact_match, "numeric_match": numeric_match}


def final_answer(completion: str) -> str:
    """Return the content of the last `<answer>` tag, or without one everything after the thinking, stripped."""
    answer = tagged(completion, "answer")
    return completion.rpartition("</think>")[2].strip() if answer is None else answer


def load_reward(location: str) -> RewardFunction:
    """Return a built-in reward by name, or the function at `package.module:function` or `path/to/file.py:function`.

    Raises ConfigError naming what could not be found.
    """
    if location in BUILT_IN:
        return BUILT_IN[location]
    source, colon, name = location.rpartition(":")
    if not colon:
        raise ConfigError(
            f"task.params.reward={location!r} is unknown; the nearest is {nearest_key(location, list(BUILT_IN))!r} "
            f"(your own: package.module:function or path/to/file.py:function)"
        )
    module = _load_file(location, Path(source)) if source.endswith(".py") else _load_module(location, source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"task.params.reward={location!r}: {source} has no function {name!r}")
    return function


def call_arguments(function: RewardFunction, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `columns` that `function` takes beside the completion: all of them if it has `**kwargs`."""
    parameters = _column_parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    return {parameter.name: columns[parameter.name] for parameter in parameters if parameter.name in columns}


def missing_columns(function: RewardFunction, columns: Mapping[str, Any]) -> list[str]:
    """Return the parameters without default that `columns` does not fill."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [each for each in _column_parameters(function) if each.kind not in variadic]
    return [each.name for each in parameters if each.default is each.empty and each.name not in columns]


@cache
def _column_parameters(function: RewardFunction) -> list[inspect.Parameter]:
    """The parameters after the first, which takes the completion."""
    return list(inspect.signature(function).parameters.values())[1:]


def _load_module(location: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except ImportError as error:
        raise ConfigError(
            f"task.params.reward={location!r}: {source!r} cannot be imported ({error}); install it or set PYTHONPATH"
        ) from error


def _load_file(location: str, path: Path) -> ModuleType:
    # The name depends on the whole path, so that two files called reward.py do not replace each other.
    name = f"spear_fast_reward_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"task.params.reward={location!r}: file {path} does not exist")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up here while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"task.params.reward={location!r}: {path} raised {error!r} when loaded") from error
    return module


def _reference_answer(ground_truth: Any) -> str:
    """The answer itself; GSM8K writes it after a worked solution and ####."""
    return str(ground_truth).rpartition("####")[2].strip()


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return None
