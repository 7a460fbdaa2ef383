"""Curves of one or several runs, drawn over each other from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_fast.errors import MissingDependencyError, SpearError

from .records import METRICS_FILE, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette, told apart also by the colour-blind; repeated beyond eight runs."""
_NEUTRAL = "#444444"
"""Colour of legend entries that hold for every run."""
_FORMATS = (".png", ".svg", ".pdf")
_TITLE_PAD = 22
"""Points between a panel and its title: room for the legend."""
_SMOOTH_SHARE = 0.1
"""Width of the moving mean as a share of the steps."""


@dataclass(frozen=True)
class _Curve:
    metric: str
    label: str
    style: str = "-"
    """Matplotlib's line style, or "o" for points where the metric is not zero."""


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    smooth: bool = False
    limits: tuple[float, float] | None = None


_PANELS = (
    _Panel("Success rate", "share of trajectories", (_Curve("reward/success_rate", "training"),), True, (-0.03, 1.03)),
    _Panel(
        "Reward",
        "mean per trajectory",
        (_Curve("reward/mean", "total"), _Curve("reward/outcome_mean", "outcome only", "--")),
        smooth=True,
    ),
    _Panel("Entropy of the policy", "nats per token", (_Curve("update/entropy_nats", "entropy"),)),
    _Panel("Tool calls", "mean per trajectory", (_Curve("reward/tool_calls_mean", "tool calls"),), smooth=True),
    _Panel(
        "Replay buffer",
        "trajectories",
        (_Curve("replay/size", "stored"), _Curve("replay/drawn", "drawn in a step", "o")),
    ),
    _Panel(
        "Schedules",
        "weight",
        (
            _Curve("schedule/mu", "mu: intrinsic reward"),
            _Curve("schedule/gamma", "gamma: self-imitation", "--"),
        ),
        limits=(-0.03, 1.03),
    ),
)
_SUPERVISED = (
    _Panel(
        "Loss",
        "nats per assistant's token",
        (_Curve("sft/loss_nats", "training"), _Curve("sft/eval_loss_nats", "held-out", "o")),
    ),
    _Panel("Norm of the gradient", "before clipping", (_Curve("update/grad_norm", "norm"),)),
    _Panel("Throughput", "packed tokens per second", (_Curve("sft/tokens_per_s", "throughput"),)),
)
_COLUMNS = 3


@dataclass(frozen=True)
class _Run:
    label: str
    color: str
    records: list[dict[str, Any]]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values (float64) of the records that hold the metric as a number."""
        points = [(record["step"], record[metric]) for record in self.records if record.get(metric) is not None]
        array = np.array(points, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


def plot_runs(run_folders: Sequence[str | Path], out: str | Path) -> Path:
    """Draw success, reward, entropy, tool calls, replay and schedules of the runs into `out` and return its path.

    Where all runs are supervised it is loss, norm of the gradient and throughput.
    `out` ends in .png, .svg or .pdf (.png is added to a name without ending); its folder is made if needed.
    Raises MissingDependencyError without matplotlib, and SpearError if there is no run, a run has no metrics, or the
    ending is another.
    """
    path = Path(out) if Path(out).suffix else Path(out).with_suffix(".png")
    if path.suffix.lower() not in _FORMATS:
        raise SpearError(f"cannot draw into {path}: the name must end in one of {', '.join(_FORMATS)}")
    runs = _read_runs([Path(folder) for folder in run_folders])
    figure = _new_figure()
    supervised = all(len(run.curve("sft/loss_nats")[0]) for run in runs)
    panels = _SUPERVISED if supervised else _PANELS
    rows = len(panels) // _COLUMNS
    figure.set_size_inches(13.5, 3.6 * rows)
    grid = figure.subplots(rows, _COLUMNS)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw_panel(axes, panel, runs)
    if not supervised:
        _draw_held_out(grid.flat[0], runs)
    for axes in grid.flat:
        _finish(axes)
    _add_run_legend(figure, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib", "track", "plotting runs") from error
    figure = Figure()
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    return figure


def _read_runs(folders: Sequence[Path]) -> list[_Run]:
    if not folders:
        raise SpearError("there is no run to plot; name at least one run folder")
    labels = _labels(folders)
    return [
        _Run(label, _COLORS[number % len(_COLORS)], _read_run(folder))
        for number, (label, folder) in enumerate(zip(labels, folders, strict=True))
    ]


def _read_run(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    try:
        records = read_records(path)
    except OSError as error:
        raise SpearError(f"{path} cannot be read ({error.strerror}); is {folder} the folder of a run?") from error
    if not records:
        raise SpearError(f"{path} holds no metrics yet; wait for the first step")
    return records


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the runs apart, at least the folder names."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return [label.replace("$", r"\$") for label in labels]


def _draw_panel(axes: Axes, panel: _Panel, runs: Sequence[_Run]) -> None:
    longest = max(len(run.curve(curve.metric)[0]) for run in runs for curve in panel.curves)
    # Odd, so that the mean is centred.
    window = 2 * round(_SMOOTH_SHARE * longest / 2) + 1 if panel.smooth else 1
    for run in runs:
        for curve in panel.curves:
            _draw_curve(axes, curve, run, window)
    if longest == 0:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="#777777")
    axes.set_title(panel.title, fontsize=12, fontweight="bold", loc="left", pad=_TITLE_PAD)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("training step" + (f" (thick lines: mean of {window} steps)" if window > 1 else ""))
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    for curve in panel.curves:
        axes.plot([], [], curve.style, color=_NEUTRAL, label=curve.label)


def _draw_curve(axes: Axes, curve: _Curve, run: _Run, window: int) -> None:
    steps, values = run.curve(curve.metric)
    if curve.style == "o":
        shown = values != 0
        axes.plot(steps[shown], values[shown], "o", color=run.color, markersize=5, markeredgecolor="white")
        return
    if window > 1:
        axes.plot(steps, values, color=run.color, alpha=0.25, linewidth=0.8)
    # A lone step would draw no line.
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, moving_mean(values, window), curve.style, color=run.color, linewidth=1.8, marker=marker)


def _draw_held_out(axes: Axes, runs: Sequence[_Run]) -> None:
    """Evaluations on held-out tasks as points with their confidence interval."""
    for run in runs:
        steps, rate = run.curve("eval/success_rate")
        low, high = run.curve("eval/success_low")[1], run.curve("eval/success_high")[1]
        errors = np.maximum(0.0, [rate - low, high - rate]) if len(rate) == len(low) == len(high) else None
        axes.errorbar(
            steps, rate, yerr=errors, fmt="o", color=run.color, markersize=6, markeredgecolor="white", capsize=3
        )
    if any(len(run.curve("eval/success_rate")[0]) for run in runs):
        axes.plot([], [], "o", color=_NEUTRAL, label="held-out, 95 % interval")


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        # Between title and panel, where it covers no curve.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.975),
            ncols=len(labels),
            fontsize=9,
            frameon=False,
            columnspacing=1.5,
            handlelength=1.8,
        )


def _add_run_legend(figure: Figure, runs: Sequence[_Run]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=run.color, linewidth=3) for run in runs]
    columns = min(len(runs), 4)
    figure.legend(handles, [run.label for run in runs], loc="outside lower center", ncols=columns, frameon=False)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean over `window` (odd) entries of float64 [n]; at the ends over the entries that exist."""
    window = min(window, len(values) - 1 + len(values) % 2)
    if window <= 1:
        return values
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")
