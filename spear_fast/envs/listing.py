"""What can be said of the built-in task sets without importing them: a line each, and the packages they need."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spear_fast.errors import MissingDependencyError

from .registry import BUILT_IN

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "alfworld": ("alfworld", ("alfworld",)),
    "babyai": ("babyai", ("minigrid",)),
    "calculator": ("envs", ("reasoning_gym",)),
    "math": ("math", ("math_verify",)),
    "shopping": ("shopping", ("tantivy",)),
}
"""Extra and packages without which nothing of a built-in task set works; those not listed need none."""


@dataclass(frozen=True)
class Listing:
    """A built-in task set, read off its source."""

    name: str
    summary: str
    """First line of the class's docstring."""
    extra: str | None
    """The extra of spear-fast that installs what it needs; None if it needs nothing."""
    missing: tuple[str, ...]
    """Packages of it that are not installed."""
    writes_games: bool
    """Whether it is a `GameWriter`."""


@cache
def listings() -> tuple[Listing, ...]:
    """Return the built-in task sets by name; nothing of them is imported."""
    return tuple(_listing(name) for name in sorted(BUILT_IN))


def check_installed(name: str) -> None:
    """Raise MissingDependencyError, which names the extra, if a built-in task set lacks a package."""
    extra, _ = NEEDS.get(name, ("", ()))
    for package in _missing(name):
        raise MissingDependencyError(package, extra, f"task set {name!r}")


def _listing(name: str) -> Listing:
    module, _, class_name = BUILT_IN[name].partition(":")
    found = _class(module, class_name)
    first = (ast.get_docstring(found) or "").split("\n\n")[0]
    methods = [node.name for node in found.body if isinstance(node, ast.FunctionDef)]
    extra, _ = NEEDS.get(name, (None, ()))
    return Listing(name, " ".join(first.split()), extra, _missing(name), "write_games" in methods)


def _missing(name: str) -> tuple[str, ...]:
    _, packages = NEEDS.get(name, ("", ()))
    return tuple(package for package in packages if importlib.util.find_spec(package) is None)


def _class(module: str, name: str) -> ast.ClassDef:
    """The source of a class, also where the module has it from another one beside it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is not in this installation"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            package = module if spec.submodule_search_locations else module.rpartition(".")[0]
            return _class(importlib.util.resolve_name("." * node.level + (node.module or ""), package), name)
    raise AssertionError(f"{module} has no class {name}")
