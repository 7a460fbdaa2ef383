"""Imports modules of verl past its package files, which need Ray, Hydra and an engine that no operator uses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

VERL = (
    "pip install --no-deps verl tensordict pyvers cloudpickle orjson importlib_metadata zipp"
    " omegaconf antlr4-python3-runtime==4.9.3"
)
_BARE = ("verl", "verl.utils", "verl.workers", "verl.workers.config")
"""Packages of which only the path is kept."""


class ActorConfig(types.SimpleNamespace):
    """In place of verl's configuration of an actor, of which the losses read fields and `get` only."""

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default`."""
        return getattr(self, name, default)


def import_verl(module: str) -> Any:
    """The module of verl by its full name.

    Raises:
        ImportError: verl, or a package that this module needs, is not installed.
    """
    if "verl" not in sys.modules:
        found = importlib.util.find_spec("verl")
        if found is None:
            raise ModuleNotFoundError("No module named 'verl'", name="verl")
        for name in _BARE:
            package = types.ModuleType(name)
            inner = name.partition(".")[2].replace(".", "/")
            package.__path__ = [f"{folder}/{inner}" for folder in found.submodule_search_locations or ()]
            sys.modules[name] = package
        vars(sys.modules["verl.workers.config"])["ActorConfig"] = ActorConfig
        groups = importlib.import_module("verl.utils.groupwise")
        for name in ("as_torch_index", "group_mean_std"):
            setattr(sys.modules["verl.utils"], name, getattr(groups, name))
    return importlib.import_module(module)


def actor_config(**fields: Any) -> Any:
    """A configuration that verl's policy losses take."""
    return sys.modules["verl.workers.config"].ActorConfig(**fields)
