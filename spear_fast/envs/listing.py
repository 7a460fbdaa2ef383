"""What can be said of the built-in task sets without importing them: a line each, and the packages they use."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .registry import BUILT_IN

USES: dict[str, tuple[str, tuple[str, ...]]] = {
    "alfworld": ("alfworld", ("alfworld",)),
    "babyai": ("babyai", ("minigrid",)),
    "calculator": ("envs", ("reasoning_gym",)),
    "gymnasium": ("gymnasium", ("gymnasium",)),
    "math": ("math", ("reasoning_gym", "math_verify")),
    "openenv": ("openenv", ("openenv",)),
    "shopping": ("shopping", ("tantivy",)),
    "verifiers": ("verifiers", ("verifiers",)),
}
"""Extra that installs what a built-in task set uses, and these packages; those that are not here use none. Without them
some task sets do nothing and some do less: they say so themselves."""
ROOT = Path(__file__).parents[2]
"""Folder of the package spear_fast."""


@dataclass(frozen=True)
class Listing:
    """A built-in task set, read off its source."""

    name: str
    summary: str
    """First line of the class's docstring."""
    extra: str | None
    """The extra of spear-fast that installs what it uses; None if it uses nothing."""
    missing: tuple[str, ...]
    """Packages it uses that are not installed."""
    writes_games: bool
    """Whether it is a `GameWriter`."""


@cache
def listings() -> tuple[Listing, ...]:
    """Return the built-in task sets by name; nothing of them is imported."""
    return tuple(_listing(name) for name in sorted(BUILT_IN))


def _listing(name: str) -> Listing:
    module, _, class_name = BUILT_IN[name].partition(":")
    found = _class(module, class_name)
    first = (ast.get_docstring(found) or "").split("\n\n")[0]
    methods = [node.name for node in found.body if isinstance(node, ast.FunctionDef)]
    extra, packages = USES.get(name, (None, ()))
    missing = tuple(package for package in packages if importlib.util.find_spec(package) is None)
    return Listing(name, " ".join(first.split()), extra, missing, "write_games" in methods)


def _class(module: str, name: str) -> ast.ClassDef:
    """The source of a class, also where the module has it from another one beside it."""
    # Not through importlib, which would import the packages that a module is in.
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    is_package = not file.is_file()
    if is_package:
        file = file.with_suffix("") / "__init__.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            package = module if is_package else module.rpartition(".")[0]
            return _class(importlib.util.resolve_name("." * node.level + (node.module or ""), package), name)
    raise AssertionError(f"{module} has no class {name}")
