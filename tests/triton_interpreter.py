"""Makes Triton's interpreter cheaper: it replaces the functions of tl once for a launch, not for every call in it."""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _NothingReplaced:
    """What the interpreter gets for a call of a device function whose launch sees the same language already."""

    def restore(self) -> None:
        pass


@cache
def _languages(function: FunctionType) -> frozenset[str]:
    """The modules that the interpreter replaces functions of when it calls `function`."""
    seen = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(module.__name__ for module in seen if module in (tl, tl.core))


def patch_once_per_launch() -> None:
    """Have a launch replace the functions of a module of `triton.language` once.

    The interpreter goes through all names of these modules again at every call of a device function, where it finds
    nothing left to replace; that takes most of the time of a small launch.
    """
    replace = interpreter._patch_lang
    if replace.__module__ == __name__:
        return
    replaced: set[str] = set()

    def replace_once(function: FunctionType) -> Any:
        languages = _languages(function)
        if languages <= replaced and languages:
            return _NothingReplaced()
        first = not replaced
        scope = replace(function)
        replaced.update(languages)
        # A launch, which comes first, is the one that restores.
        if first:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    interpreter._patch_lang = replace_once
