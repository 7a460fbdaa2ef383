"""A run that is asked to end finishes its step and saves it first."""

from __future__ import annotations

import signal
import threading
from typing import Protocol

EXIT_STOPPED = 143
"""Exit code of a run that SIGTERM ended early."""


class Stoppable(Protocol):
    """A run that looks at `stop_requested` after each step."""

    stop_requested: bool


def stop_on_sigterm(run: Stoppable) -> None:
    """Let the running step finish and be saved before the process ends."""

    def request_stop(*_: object) -> None:
        run.stop_requested = True

    # Only the main thread may set handlers; a caller on another thread keeps its own.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, request_stop)
