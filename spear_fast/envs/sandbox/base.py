"""What a sandbox is: code in, a result in SandboxFusion's shape out, whatever the code did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

RunStatus = Literal["Success", "Failed", "SandboxError"]
"""Success: the code ended with return code 0. Failed: it did not, or ran out of time. SandboxError: it never ran."""
Ending = Literal["Finished", "Error", "TimeLimitExceeded"]
"""How the run ended, by itself, with an error of the sandbox, or at its time limit."""


@dataclass(frozen=True)
class RunResult:
    """The end of one run, e.g. `RunResult("Success", "Finished", 0, "4\\n", "", 0.008)`.

    Field names and values are SandboxFusion's.
    """

    status: RunStatus
    ending: Ending
    return_code: int | None
    stdout: str
    """Decoded as UTF-8 with replacement; at the sandbox's limit of output the rest is left out."""
    stderr: str
    """Likewise; here the end is kept, which says what went wrong."""
    execution_time: float
    """Seconds of wall time."""
    message: str = ""
    """What the sandbox itself has to say, where it failed."""


class Sandbox(Protocol):
    """A place to run code. One is shared by all trajectories of a process."""

    async def run(
        self, code: str, *, timeout_s: float, stdin: str = "", files: Mapping[str, bytes] | None = None
    ) -> RunResult:
        """Run Python `code` in a fresh process and return how it ended; what the code does never raises.

        Args:
            code: The program.
            timeout_s: Wall time, in seconds; waiting for a free worker does not count.
            stdin: What it can read.
            files: Files in its working directory, by name.
        """
        ...

    def close(self) -> None:
        """End the workers, also those that run. Called once, outside the event loop of the runs."""
        ...
