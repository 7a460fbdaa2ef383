"""Which sandbox a task uses: its parameters, and the check that it can run here before any work starts."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated, Literal

from pydantic import Field, model_validator

from spear_fast.config.section import Positive, PositiveFloat, Section
from spear_fast.errors import ConfigError

from .base import Sandbox


class SandboxParams(Section):
    """Where code of the policy runs, and its limits."""

    kind: Literal["bubblewrap", "sandbox_fusion", "monty"] = "bubblewrap"
    """"bubblewrap": processes here, shut in by the kernel. "sandbox_fusion": a SandboxFusion server at `url`.
    "monty": an interpreter of a part of Python, a weaker choice without numpy and sympy (extra "sandbox-monty")."""
    url: str | None = None
    """Address of the SandboxFusion server, e.g. http://host:8080."""
    workers: Annotated[int, Field(ge=1, le=256)] = Field(default_factory=lambda: min(8, os.cpu_count() or 1))
    """Programs that run at once in this process, or requests to the server. Default: the cores, at most 8."""
    timeout_s: PositiveFloat = 25.0
    """Wall time of a program, in seconds. Keep it below rollout.tool_timeout_s, so that the policy reads of it."""
    memory_mb: Annotated[int, Field(ge=256)] = 1024
    """Memory of a program, in MiB: address space of each of its processes, and what all of them hold together."""
    max_output_chars: Positive = 65_536
    """Characters kept of each of stdout and stderr."""
    max_processes: Annotated[int, Field(ge=1, le=4096)] = 32
    """Processes and threads of a program."""
    disk_mb: Positive = 64
    """Files of a program, in MiB; they are kept in memory."""
    preload: list[str] = Field(default_factory=lambda: ["math", "numpy", "sympy"])
    """Modules that a bubblewrap worker has imported before the program starts."""

    @model_validator(mode="after")
    def _url_fits_kind(self) -> SandboxParams:
        if self.kind == "sandbox_fusion" and not self.url:
            raise ValueError("sandbox.kind=sandbox_fusion needs sandbox.url, e.g. http://host:8080; set it")
        if self.kind != "sandbox_fusion" and self.url:
            raise ValueError(f"sandbox.url={self.url!r} is used by kind=sandbox_fusion only; remove it or set the kind")
        return self


def make_sandbox(params: SandboxParams) -> Sandbox:
    """Return the sandbox of `params`; workers start with the first run.

    Raises:
        ConfigError: Bubblewrap is absent or cannot make a sandbox here, a module to preload is not installed, or the
            URL is none. No other kind is taken instead.
        MissingDependencyError: kind=monty without pydantic-monty.
    """
    if params.kind == "sandbox_fusion":
        from .fusion import FusionSandbox

        return FusionSandbox(params.url or "", params.workers, params.memory_mb, params.max_output_chars)
    if params.kind == "monty":
        from .monty import MontySandbox

        return MontySandbox(params.workers, params.memory_mb, params.max_output_chars)
    from .bubblewrap import BubblewrapSandbox
    from .jail import Limits

    _check_installed(params.preload)
    limits = Limits(params.memory_mb, params.max_output_chars, params.max_processes, params.disk_mb)
    return BubblewrapSandbox(params.workers, limits, params.preload)


def _check_installed(modules: list[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        raise ConfigError(f"sandbox.preload={missing}: not installed here; install them or leave them out")
