"""What a run shows while it works: a live display, one line per step, or nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import mean
from time import perf_counter
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHOWN: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward/mean", "{:.3f}"),
    ("success", "reward/success_rate", "{:.1%}"),
    ("held-out", "eval/success_rate", "{:.1%}"),
    ("loss", "sft/loss_nats", "{:.3f} nats"),
    ("held-out loss", "sft/eval_loss_nats", "{:.3f} nats"),
    ("tokens/s", "sft/tokens_per_s", "{:.0f}"),
    ("tool calls", "reward/tool_calls_mean", "{:.2f}"),
    ("entropy", "update/entropy_nats", "{:.3f} nats"),
    ("replay", "replay/size", "{:.0f}"),
    ("mu", "schedule/mu", "{:.3f}"),
    ("gamma", "schedule/gamma", "{:.3f}"),
)
"""Label, metric and format of each number on display."""

_ETA_WINDOW = 20
"""Latest steps whose mean duration gives the remaining time."""


class Progress:
    """The shared interface, and the silent display: use as a context manager, call `phase`, `step` and `note`."""

    def __init__(self, total_steps: int, name: str) -> None:
        self.name = name
        self.total_steps = total_steps
        self.current_phase = "starting"
        self.done_steps = 0
        self.latest: dict[str, float] = {}
        self._phase_started = self._step_started = perf_counter()
        self._durations: deque[float] = deque(maxlen=_ETA_WINDOW)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin showing."""

    def stop(self) -> None:
        """Stop showing and leave the terminal as it was; may be called twice."""

    def phase(self, name: str) -> None:
        """Say what the run does now, e.g. "rollout"."""
        self.current_phase = name
        self._phase_started = perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics after `step` finished steps; called for training steps and for evaluations."""
        now = perf_counter()
        if step > self.done_steps:
            if self.done_steps > 0:
                self._durations.append((now - self._step_started) / (step - self.done_steps))
            self.done_steps = step
            self._step_started = now
        self.latest.update(metrics)

    def note(self, text: str) -> None:
        """Print one message that stays."""

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print a table that stays; the first row is its header."""
        self.note("\n".join([title, *aligned(rows)]))

    def eta_s(self) -> float | None:
        """Seconds until the last step at the recent pace, or None before a whole step was seen."""
        return mean(self._durations) * (self.total_steps - self.done_steps) if self._durations else None

    def phase_s(self) -> float:
        """Seconds spent in the current phase so far."""
        return perf_counter() - self._phase_started


class PlainProgress(Progress):
    """One line per report, for logs and pipes."""

    def __init__(self, total_steps: int, name: str, console: Console) -> None:
        super().__init__(total_steps, name)
        self._console = console

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the numbers of this report and the remaining time."""
        super().step(step, metrics)
        numbers = [f"{label} {text}" for label, text in shown_numbers(metrics)]
        self._print(" | ".join([f"step {step}/{self.total_steps}", *numbers, f"ETA {duration_text(self.eta_s())}"]))

    def note(self, text: str) -> None:
        """Print the message as a line."""
        self._print(text)

    def _print(self, text: str) -> None:
        # soft_wrap: a pipe has no width, and a cut line cannot be searched.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class RichProgress(Progress):
    """A live display that redraws itself four times a second."""

    def __init__(self, total_steps: int, name: str, console: Console) -> None:
        super().__init__(total_steps, name)
        self._console = console
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=4, redirect_stdout=True, redirect_stderr=True
        )

    def start(self) -> None:
        """Take over the bottom of the terminal."""
        self._live.start()

    def stop(self) -> None:
        """Draw a last time and give the terminal back."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Print the message above the display."""
        self._console.print(text, markup=False, highlight=False)

    def _draw(self) -> Group:
        heading = Text.assemble(
            (self.name, "bold"),
            f"  step {self.done_steps}/{self.total_steps}  ",
            (self.current_phase, "cyan"),
            f" {duration_text(self.phase_s())}  ETA {duration_text(self.eta_s())}",
        )
        numbers = Table.grid(padding=(0, 3))
        for _ in range(4):
            numbers.add_column(no_wrap=True)
        cells = [Text.assemble((label + " ", "dim"), text) for label, text in shown_numbers(self.latest)]
        for start in range(0, len(cells), 4):
            numbers.add_row(*cells[start : start + 4])
        return Group(heading, ProgressBar(total=max(self.total_steps, 1), completed=self.done_steps), numbers)


def make_progress(
    mode: Literal["auto", "rich", "plain", "off"], total_steps: int, name: str, console: Console | None = None
) -> Progress:
    """Return the display for `log.progress`; "auto" is rich on a terminal and plain elsewhere."""
    console = console or Console()
    if mode == "auto":
        mode = "rich" if console.is_terminal else "plain"
    if mode == "rich":
        return RichProgress(total_steps, name, console)
    return PlainProgress(total_steps, name, console) if mode == "plain" else Progress(total_steps, name)


def shown_numbers(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return (label, text) of the metrics in SHOWN that are present, in its order."""
    return [(label, form.format(metrics[name])) for label, name, form in SHOWN if name in metrics]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, the first column flush left and the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration_text(seconds: float | None) -> str:
    """Return e.g. "7s", "3m 05s", "2h 04m"; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
