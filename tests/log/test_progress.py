"""The displays: right numbers, one line per step without a terminal, a quiet mode."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from spear_fast.log import progress as progress_module
from spear_fast.log.progress import PlainProgress, Progress, RichProgress, duration_text, make_progress

METRICS = {
    "reward/mean": 0.5,
    "reward/success_rate": 0.25,
    "update/entropy_nats": 1.25,
    "replay/size": 12.0,
    "schedule/mu": 0.75,
    "schedule/gamma": 0.125,
    "time_s": 2.0,
}


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def text_of(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test moves `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(progress_module, "perf_counter", lambda: now[0])
    return now


def test_plain_prints_one_line_per_step_at_any_width() -> None:
    target = console()
    with make_progress("plain", 10, "run", target) as progress:
        progress.phase("rollout")
        progress.step(1, METRICS)
        progress.step(1, {"eval/success_rate": 0.5})
        progress.note("[bold]saved[/bold]")
    lines = text_of(target).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 1/10 | reward 0.500 | success 25.0% | entropy 1.250 nats | replay 12 | mu 0.750")
    assert "held-out 50.0%" in lines[1]
    assert lines[2] == "[bold]saved[/bold]"


def test_rich_shows_phase_numbers_and_eta(clock: list[float]) -> None:
    target = console(terminal=True)
    with make_progress("rich", 10, "[run]", target) as progress:
        progress.step(1, METRICS)
        clock[0] += 4.0
        progress.step(2, METRICS)
        progress.phase("update")
        clock[0] += 7.0
    shown = text_of(target)
    for text in (
        "[run]",
        "step 2/10",
        "update 7s",
        "ETA 32s",
        "reward 0.500",
        "success 25.0%",
        "mu 0.750",
        "gamma 0.125",
    ):
        assert text in shown


def test_off_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress("off", 10, "run") as progress:
        progress.phase("rollout")
        progress.step(1, METRICS)
        progress.note("saved")
    assert capsys.readouterr() == ("", "")


def test_auto_follows_the_terminal() -> None:
    assert isinstance(make_progress("auto", 1, "run", console(terminal=True)), RichProgress)
    assert isinstance(make_progress("auto", 1, "run", console(terminal=False)), PlainProgress)


def test_eta_counts_the_steps_of_this_process_only(clock: list[float]) -> None:
    """A resumed run begins at step 50 without taking the first 50 for instantaneous."""
    progress = Progress(60, "run")
    progress.step(50, METRICS)
    assert progress.eta_s() is None
    clock[0] += 3.0
    progress.step(51, METRICS)
    progress.step(51, {"eval/success_rate": 0.5})
    assert progress.eta_s() == pytest.approx(27.0)
    assert progress.latest["eval/success_rate"] == 0.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (7.4, "7s"), (59.6, "1m 00s"), (185, "3m 05s"), (7440, "2h 04m")]
)
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_display_is_released_after_an_error() -> None:
    target = console(terminal=True)
    progress = make_progress("rich", 1, "run", target)
    with pytest.raises(RuntimeError), progress:
        raise RuntimeError
    with progress:
        pass
