"""Toolsets of verifiers in this process: their tools as functions, one set of servers' objects for each episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spear_fast.errors import ConfigError

from .recorded_tools import Recording, recorded


class Toolsets:
    """The toolsets of a taskset's tasks. A tool keeps the name under which verifiers would show it."""

    def __init__(self, taskset: Any) -> None:
        """Raises ConfigError for toolsets that verifiers would share, serve elsewhere, or give a common state."""
        from verifiers.v1 import SubprocessConfig  # pyright: ignore[reportMissingImports]
        from verifiers.v1.utils.decorators import discover_decorated  # pyright: ignore[reportMissingImports]

        self._kind = type(taskset).task_type()
        self._config = taskset.config.task
        if taskset.toolsets(taskset.config):
            raise ConfigError("task.params.taskset: its tasks share a toolset; only toolsets of a task are supported")
        toolsets = self._kind.toolsets(self._config)
        stateful = [toolset for toolset in toolsets if type(toolset.state).model_fields.keys() - {"artifacts"}]
        if len(stateful) > 1:
            raise ConfigError("task.params.taskset: several of its toolsets have state; only one is supported")
        self._stateful = toolsets.index(stateful[0]) if stateful else None
        self.tools: list[Callable[..., Any]] = []
        for place, toolset in enumerate(toolsets):
            if toolset.config.url is not None or not isinstance(toolset.config.runtime, SubprocessConfig):
                raise ConfigError(
                    f"task.params.taskset: {type(toolset).__name__} runs elsewhere; only toolsets of the same machine "
                    "are supported"
                )
            self.tools += [_tool(place, toolset, method) for method in discover_decorated(toolset, "tool")]

    async def start(self, task: Any) -> list[Any]:
        """Return fresh toolsets, set up for a task."""
        toolsets = self._kind.toolsets(self._config)
        for toolset in toolsets:
            await toolset.setup()
            await toolset.setup_task(task.data)
        return toolsets

    def state(self, toolsets: list[Any], task: Any) -> Any:
        """Return the state that the task's hooks and the tools of an episode share.

        Raises ConfigError if they are not of one class.
        """
        from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]

        kind = state_cls(type(task))
        if self._stateful is None:
            return kind()
        state = toolsets[self._stateful].state
        if not isinstance(state, kind):
            raise ConfigError(
                f"task.params.taskset: its tools have the state {type(state).__name__}, its tasks {kind.__name__}; "
                "give both the same"
            )
        return state


def _tool(place: int, toolset: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    attribute = method.__name__
    name = getattr(method, "tool_name", None) or attribute
    full_name = f"{toolset.server_name}_{name}" if toolset.server_name else name

    def target(recording: Recording) -> Callable[..., Any]:
        return getattr(recording.owner[place], attribute)

    return recorded(full_name, getattr(type(toolset), attribute), target, is_method=True)
