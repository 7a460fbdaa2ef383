"""Plots of runs: drawn from real files, with errors a user can act on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from spear_fast.errors import MissingDependencyError, SpearError
from spear_fast.log import plot as plot_module
from spear_fast.log.plot import moving_mean, plot_runs
from spear_fast.log.sinks import JsonlSink


def make_run(folder: Path, steps: int = 30) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.write(0, {"eval/success_rate": 0.0, "eval/success_low": 1e-18, "eval/success_high": 0.2})
    for step in range(1, steps + 1):
        sink.write(
            step,
            {
                "reward/success_rate": step / steps,
                "reward/mean": step / steps + 0.1,
                "reward/outcome_mean": step / steps,
                "update/entropy_nats": 1 / step,
                "reward/tool_calls_mean": 1.0,
                "replay/size": 4.0 * step,
                "replay/drawn": 8.0 * (step % 10 == 0),
                "schedule/mu": 1 - step / steps,
                "schedule/gamma": float("nan") if step == 2 else step / steps,
            },
        )
    sink.close()
    return folder


def figure_of(monkeypatch: pytest.MonkeyPatch, folders: list[Path], out: Path) -> Figure:
    """The figure that plot_runs saved."""
    figures = []
    new_figure = plot_module._new_figure
    monkeypatch.setattr(plot_module, "_new_figure", lambda: figures.append(new_figure()) or figures[-1])
    plot_runs(folders, out)
    return figures[0]


def test_a_png_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    out = plot_runs([make_run(tmp_path / "spear")], tmp_path / "pictures" / "curves")
    assert out == tmp_path / "pictures" / "curves.png"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_the_recorded_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, [make_run(tmp_path / "spear")], tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [
        "Success rate", "Reward", "Entropy of the policy", "Tool calls", "Replay buffer", "Schedules",
    ]  # fmt: skip
    entropy = panels["Entropy of the policy"].lines[0]
    np.testing.assert_allclose(entropy.get_ydata(), [1 / step for step in range(1, 31)])
    np.testing.assert_array_equal(entropy.get_xdata(), range(1, 31))
    gamma = panels["Schedules"].lines[1]
    assert 2 not in gamma.get_xdata()
    drawn = panels["Replay buffer"].lines[1]
    np.testing.assert_array_equal(drawn.get_xdata(), [10, 20, 30])
    held_out = panels["Success rate"].containers[0].lines[0]
    np.testing.assert_array_equal(held_out.get_ydata(), [0.0])


def make_supervised(folder: Path) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.write(0, {"sft/eval_loss_nats": 5.0})
    for step in (1, 2):
        sink.write(step, {"sft/loss_nats": 4.0 - step, "update/grad_norm": 1.0, "sft/tokens_per_s": 9.0})
    sink.write(2, {"sft/eval_loss_nats": 3.0})
    sink.close()
    return folder


def test_supervised_runs_have_panels_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = make_supervised(tmp_path / "sft")
    figure = figure_of(monkeypatch, [supervised], tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["Loss", "Norm of the gradient", "Throughput"]
    training, held_out = panels["Loss"].lines[:2]
    np.testing.assert_array_equal(training.get_ydata(), [3.0, 2.0])
    np.testing.assert_array_equal(held_out.get_xdata(), [0, 2])
    mixed = figure_of(monkeypatch, [supervised, make_run(tmp_path / "spear")], tmp_path / "curves.png")
    assert len(mixed.axes) == 6


def test_runs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal folder names are prefixed by their parents; names with a meaning to matplotlib are shown as they are."""
    folders = [make_run(tmp_path / "a" / "_seed$0$"), make_run(tmp_path / "b" / "_seed$0$", steps=3)]
    figure = figure_of(monkeypatch, folders, tmp_path / "curves.svg")
    assert [text.get_text() for text in figure.legends[0].texts] == [r"a/_seed\$0\$", r"b/_seed\$0\$"]
    colors = {line.get_color() for line in figure.axes[2].lines[:2]}
    assert len(colors) == 2


def test_a_single_underscored_run_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, [make_run(tmp_path / "_run", steps=1)], tmp_path / "curves.png")
    assert [text.get_text() for text in figure.legends[0].texts] == ["_run"]


def test_metrics_that_a_run_lacks_are_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    sink.write(1, {"reward/mean": 1.0})
    sink.close()
    figure = figure_of(monkeypatch, [tmp_path / "run"], tmp_path / "curves.png")
    assert [text.get_text() for text in figure.axes[2].texts] == ["not recorded"]
    assert not figure.axes[1].texts


def test_unusable_input_is_explained(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SpearError, match=r"is .*empty the folder of a run"):
        plot_runs([empty], tmp_path / "curves.png")
    (empty / "metrics.jsonl").touch()
    with pytest.raises(SpearError, match="holds no metrics yet"):
        plot_runs([empty], tmp_path / "curves.png")
    with pytest.raises(SpearError, match="name at least one run"):
        plot_runs([], tmp_path / "curves.png")
    with pytest.raises(SpearError, match=r"must end in one of \.png"):
        plot_runs([empty], tmp_path / "curves.docx")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "spear")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[track\]"):
        plot_runs([run], tmp_path / "curves.png")


@given(values=st.lists(st.floats(-1e3, 1e3), max_size=30), half=st.integers(0, 20))
def test_moving_mean_is_the_mean_of_neighbours(values: list[float], half: int) -> None:
    found = moving_mean(np.array(values, dtype=np.float64), 2 * half + 1)
    reach = min(half, (len(values) - 1) // 2) if values else 0
    expected = [np.mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]
    np.testing.assert_allclose(found, expected, atol=1e-9)
