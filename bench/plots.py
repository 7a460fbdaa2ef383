"""Plots of the kernel benchmark's results from its file alone: time, memory and share of the floor.

python bench/plots.py bench/results/cpu/kernels.json bench/results/cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def main() -> None:
    """Draw the file named first into the folder named second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("result", type=Path, help="what bench/kernels.py --out wrote")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    print(*draw(result, args.folder, args.result.stem), sep="\n")


def draw(result: Record, folder: Path, name: str) -> list[Path]:
    """Write NAME-LEVEL[-HEAD].png, over N where a level has heads, else over its losses or operators; the paths.

    `name` is that of the result file without its ending, so that several files can be drawn into one folder.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib, or the extra 'track'") from None
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Record]] = {}
    for case in result["cases"]:
        head = f"-h{case['hidden_size']}" if "hidden_size" in case else ""
        groups.setdefault(f"{name}-{case['level']}{head}", []).append(case)
    paths = []
    for title, cases in groups.items():
        figure = _over_variants(cases) if cases[0]["variant"] else _over_sizes(cases)
        figure.suptitle(_title(cases[0], result), fontsize="medium")
        paths.append(folder / f"{title}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths


def _title(case: Record, result: Record) -> str:
    head = f", H {case['hidden_size']} V {case['vocab_size']} {case['dtype']}" if "hidden_size" in case else ""
    gpus, machine = result["machine"]["gpus"], result["machine"]
    on_gpu = result["settings"]["device"] == "cuda" and gpus
    where = gpus[0]["name"] if on_gpu else f"{result['settings']['threads']} threads of {machine['processor']}"
    return f"{case['level']}{head}, {where}, commit {machine['commit']}"


def _figure(panels: int, height: float = 4) -> Any:
    from matplotlib.figure import Figure

    rows = 2 if panels == 4 else 1
    columns = panels // rows
    figure = Figure(figsize=(5 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _over_sizes(cases: list[Record]) -> Any:
    """Time, memory and share of the floor over N with all tokens active and live; that share for other cases too."""
    full = [case for case in cases if case["active_share"] == case["live_share"] == 1]
    full = sorted(full or cases, key=lambda case: case["num_rows"])
    shares = [case for case in cases if case not in full]
    figure, axes = _figure(4 if shares else 3)
    panels = (
        ("forward and backward, ms", lambda entry, case: entry["median_s"] * 1e3, "log"),
        ("memory beyond inputs and gradients, MiB", _extra_mebibytes, "linear"),
        ("share of the floor", lambda entry, case: entry.get("floor_share"), "linear"),
    )
    for axis, (label, value_of, scale) in zip(axes, panels, strict=False):
        for name, style in _styles(cases).items():
            points = [(case["num_rows"], _value(case, name, value_of)) for case in full]
            points = [(x, y) for x, y in points if y is not None]
            axis.plot(*zip(*points, strict=True), label=name, **style) if points else None
        axis.set(xlabel="N", ylabel=label, xscale="log", yscale=scale)
        axis.set_xticks([case["num_rows"] for case in full], [str(case["num_rows"]) for case in full])
        axis.minorticks_off()
    if shares:
        labels = [f"N {c['num_rows']}\na {c['active_share']:g} g {c['live_share']:g}" for c in shares]
        _bars(axes[3], shares, labels, "share of the floor", panels[2][1])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def _over_variants(cases: list[Record]) -> Any:
    """Time, share of the floor and memory of each loss or operator."""
    labels = [f"{case['variant']}\n{case['num_rows']}" for case in cases]
    figure, axes = _figure(3, 1 + len(cases) * 0.8)
    _bars(axes[0], cases, labels, "ms", lambda entry, case: entry["median_s"] * 1e3)
    axes[0].set_xscale("log")
    _bars(axes[1], cases, labels, "share of a copy's bandwidth", lambda entry, case: entry.get("floor_share"))
    _bars(axes[2], cases, labels, "memory beyond inputs and gradients, MiB", _extra_mebibytes)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def _bars(axis: Any, cases: list[Record], labels: list[str], label: str, value_of: Any) -> None:
    styles = _styles(cases)
    height = 0.8 / max(1, len(styles))
    for place, (name, style) in enumerate(styles.items()):
        values = [_value(case, name, value_of) for case in cases]
        where = [index + place * height for index, value in enumerate(values) if value is not None]
        axis.barh(where, [value for value in values if value is not None], height, label=name, color=style["color"])
    axis.set_yticks([index + 0.4 for index in range(len(cases))], labels, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(label)


def _styles(cases: list[Record]) -> dict[str, dict[str, Any]]:
    """Measured contenders in a fixed order: ours in full lines, the others dashed."""
    from matplotlib import colormaps

    names = dict.fromkeys(
        name for case in cases for name, entry in case["contenders"].items() if entry["status"] == "measured"
    )
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    packages = {name: "package" in case["contenders"][name] for case in cases for name in case["contenders"]}
    return {
        name: {
            "color": colours[index % len(colours)],
            "marker": "o",
            "markersize": 4,
            "linestyle": "--" if packages[name] or name.startswith(("naive", "floor", "copy")) else "-",
        }
        for index, name in enumerate(names)
    }


def _value(case: Record, name: str, value_of: Any) -> float | None:
    entry = case["contenders"].get(name)
    return value_of(entry, case) if entry and entry["status"] == "measured" else None


def _extra_mebibytes(entry: Record, case: Record) -> float | None:
    peak = entry.get("peak_extra_bytes")
    return None if peak is None else max(0, peak - case["gradient_bytes"]) / 2**20


if __name__ == "__main__":
    main()
