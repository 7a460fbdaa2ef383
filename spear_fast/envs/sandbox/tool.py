"""The code interpreter as a tool of the policy: runs its code and returns the text that it reads back."""

from __future__ import annotations

import re

from .base import RunResult, Sandbox

_FENCED = re.compile(r"\A\s*```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:\r?\n)?[ \t]*```\s*\Z", re.DOTALL | re.IGNORECASE)

SHOWN_ERROR_LINES = 2
ERROR_HINT = "The code failed; correct it and call again."
EMPTY_NOTE = "The code printed nothing; print what you want to see."


class CodeInterpreter:
    """The tool of the paper's math set-up. One sandbox serves the tools of all trajectories."""

    def __init__(self, sandbox: Sandbox, timeout_s: float = 30.0) -> None:
        """`timeout_s` is the wall time of one call in seconds."""
        self._sandbox = sandbox
        self._timeout_s = timeout_s

    async def code_interpreter(self, code: str) -> str:
        """Run Python code in a fresh process and return what it prints.

        Args:
            code: The program; it must print its result.
        """
        return shown(await self._sandbox.run(unfenced(code), timeout_s=self._timeout_s), self._timeout_s)


def unfenced(code: str) -> str:
    """Return the code without the Markdown fence that models like to put around it."""
    fenced = _FENCED.match(code)
    return fenced[1] if fenced else code


def shown(result: RunResult, timeout_s: float) -> str:
    """Return what the policy reads of a run.

    As in the authors' tool: stdout alone if nothing failed, else the last two lines of stderr and a hint. Unlike there,
    a program that ends well and only warns on stderr counts as ended well, and a time-out is told apart.
    """
    if result.status == "SandboxError":
        return f"The code could not be run ({result.message or 'no reason given'}); call again."
    if result.ending == "TimeLimitExceeded":
        return _joined(result.stdout, f"The code was stopped after {timeout_s:g} s; make it faster.")
    if result.status == "Failed":
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()][-SHOWN_ERROR_LINES:]
        return "\n".join([*(lines or [result.message or f"It ended with code {result.return_code}."]), ERROR_HINT])
    return result.stdout.strip() or EMPTY_NOTE


def _joined(stdout: str, note: str) -> str:
    return f"{stdout.strip()}\n{note}".strip()
