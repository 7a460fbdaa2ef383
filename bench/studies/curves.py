"""A study's curves over environment steps: means over seeds, and between the lowest and the highest a shade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.studies.tables import title

PANELS = {
    "held-out success": "evaluations",
    "success in training": "success",
    "entropy, nats per token": "entropy",
    "turns of a trajectory": "turns",
    "tool calls of a trajectory": "tool_calls",
    "rows in the replay buffer": "replay",
}
"""Title of each panel, and what it shows."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
POINTS = 40
"""Places on the axis at which runs are averaged."""


def draw(result: Mapping[str, Any], path: Path, heading: str) -> None:
    """Draw every arm that is no ablation into `path`: baselines dashed, with SPEAR in full lines.

    Panels that are zero in all runs are left out.
    """
    from matplotlib.figure import Figure

    shown = {arm: list(runs.values()) for arm, runs in result["runs"].items() if ":" not in arm}
    panels = {
        name: key
        for name, key in PANELS.items()
        if any(_series(run, key)[1].any() for runs in shown.values() for run in runs)
    }
    columns = (len(panels) + 1) // 2
    figure = Figure(figsize=(5 * columns, 7.5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).ravel()
    colors = dict(zip(dict.fromkeys(arm.partition("+")[0] for arm in shown), COLORS, strict=False))
    for axis, (name, key) in zip(axes, panels.items(), strict=False):
        for arm, runs in shown.items():
            _draw_arm(axis, runs, key, title(arm), colors[arm.partition("+")[0]], "-" if "+" in arm else "--")
        axis.set(title=name, xlabel="environment steps")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(heading, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _draw_arm(axis: Any, runs: Sequence[Mapping[str, Any]], key: str, label: str, color: str, style: str) -> None:
    series = [_series(run, key) for run in runs]
    series = [(x, y) for x, y in series if len(x)]
    if not series:
        return
    places = np.linspace(max(x[0] for x, _ in series), min(x[-1] for x, _ in series), POINTS)
    values = np.stack([np.interp(places, x, _smooth(y) if key != "evaluations" else y) for x, y in series])
    axis.plot(places, values.mean(0), style, color=color, label=label, linewidth=1.5)
    axis.fill_between(places, values.min(0), values.max(0), color=color, alpha=0.08, linewidth=0)


def _series(run: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps and values, float64 [n] each."""
    if key == "evaluations":
        points = [(point["env_steps"], point["success"]) for point in run["evaluations"]]
    else:
        points = [(point["env_steps"], point[key]) for point in run["curves"] if point.get(key) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over three neighbours; float64 [n] in and out."""
    padded = np.pad(values, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3
