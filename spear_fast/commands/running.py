"""A run that a command makes: shown while it lasts, closed at its end, and saved first when it is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from spear_fast.config.schema import RunConfig
    from spear_fast.log.progress import Progress

EXIT_STOPPED = 143
"""Exit code of a run that SIGTERM ended early."""


class Run(Protocol):
    """A run that looks at `stop_requested` after each step."""

    stop_requested: bool

    def close(self) -> None:
        """Give back what it holds."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


@contextmanager
def running(config: RunConfig, steps: int, make: Callable[[Progress], AnyRun]) -> Iterator[AnyRun]:
    """Make a run of `steps` steps whose progress the main rank shows, and close it; SIGTERM asks it to end."""
    from spear_fast.dist import is_main_rank
    from spear_fast.log.progress import make_progress
    from spear_fast.update.model import silence_progress_bars

    silence_progress_bars()
    shown = config.log.progress if is_main_rank() else "off"
    with make_progress(shown, steps, config.name) as progress:
        run = make(progress)
        try:
            _stop_on_sigterm(run)
            yield run
        finally:
            run.close()


def _stop_on_sigterm(run: Run) -> None:
    """Let the running step finish and be saved before the process ends."""

    def request_stop(*_: object) -> None:
        run.stop_requested = True

    # Only the main thread may set handlers; a caller on another thread keeps its own.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, request_stop)
