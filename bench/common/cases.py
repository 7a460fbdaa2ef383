"""Rows of a result file: what was measured, what is not installed, what failed; shown as tables and written as JSON.

A result is {"benchmark", "machine", "settings", "cases": [{"name", "rows": {name: row}}]}; a row has a "status"
("measured", "not installed", "failed" or "refused"), and when measured "median_s", "times_s" and "spread".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.result_file import write_json
from spear_fast.errors import MissingDependencyError

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A heading, and the cell of a measured row."""

STATUSES = ("measured", "not installed", "failed", "refused")
_REASON_CHARS = 300
_FILE_WIDTH = 120


def positive(text: str) -> int:
    """An argument of a command line that must be a whole number from 1. Raises ArgumentTypeError for any other."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def measured(times: Sequence[float], **more: Any) -> Row:
    """A row of times in seconds, at least one: their median, all of them, and slowest / fastest - 1."""
    fastest, slowest = min(times), max(times)
    spread = slowest / fastest - 1 if fastest > 0 else None
    return {
        "status": "measured",
        "median_s": statistics.median(times),
        "times_s": list(times),
        "spread": spread,
        **more,
    }


def unmeasured(error: Exception) -> Row:
    """The row of a contender that is not installed or that failed."""
    status = "not installed" if isinstance(error, MissingDependencyError | ModuleNotFoundError) else "failed"
    return {"status": status, "reason": shortened(f"{type(error).__name__}: {error}")}


def shortened(reason: str) -> str:
    """As much of a reason as a result file takes."""
    return reason[:_REASON_CHARS]


def refused(reason: str, **more: Any) -> Row:
    """The row of a contender whose result is wrong: it gets no speed."""
    return {"status": "refused", "reason": reason, **more}


def check_result(result: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, for a result that `compare.py` could not walk."""
    lacking = {"benchmark", "machine", "settings", "cases"} - set(result)
    if lacking:
        raise ValueError(f"the result lacks {sorted(lacking)}; write all four keys")
    for case in result["cases"]:
        for name, row in case["rows"].items():
            if row.get("status") not in STATUSES:
                raise ValueError(f"case {case['name']!r}, row {name!r}: status={row.get('status')!r}; use {STATUSES}")
            needed = {"median_s", "times_s"} if row["status"] == "measured" else {"reason"}
            if not needed <= set(row):
                raise ValueError(f"case {case['name']!r}, row {name!r} lacks {sorted(needed - set(row))}")


def wrong(result: Mapping[str, Any], peers: Collection[str] = ()) -> bool:
    """Whether a row of this project or a floor failed or was refused; `peers` names the rows of others."""
    return any(
        row["status"] in ("failed", "refused")
        for case in result["cases"]
        for name, row in case["rows"].items()
        if name not in peers
    )


def write(result: Mapping[str, Any], file: Path | None) -> None:
    """Check a result and write it as JSON, making folders; None only checks it."""
    check_result(result)
    write_json(result, file)


def show(result: Mapping[str, Any], columns: Sequence[Column]) -> None:
    """Print one table per case; a row without a measurement says why."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for case in result["cases"]:
        used = _used(case, columns)
        console.print(case["name"], style="bold", markup=False, highlight=False)
        table = Table()
        table.add_column("")
        for heading, _ in used:
            table.add_column(heading, justify="right")
        reasons = []
        for name, row in case["rows"].items():
            if row["status"] == "measured":
                table.add_row(name, *(cell(row) for _, cell in used))
            else:
                table.add_row(name, row["status"])
                reasons.append(f"{name}: {row['reason']}")
        console.print(table)
        for reason in reasons:
            console.print(reason, markup=False, highlight=False)


def markdown_tables(result: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Return one table per case for a README; a row without a measurement has its status, and its reason below."""
    lines: list[str] = []
    for case in result["cases"]:
        used = _used(case, columns)
        lines += [f"{case['name']}:", "", f"| | {' | '.join(heading for heading, _ in used)} |"]
        lines.append("|" + "---|" * (len(used) + 1))
        for name, row in case["rows"].items():
            done = row["status"] == "measured"
            cells = [cell(row) for _, cell in used] if done else [row["status"], *[""] * (len(used) - 1)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", *_reasons(case)]
    return "\n".join(lines)


def _reasons(case: Mapping[str, Any]) -> list[str]:
    """Why rows have no figure, as Markdown lines: rows of one reason together."""
    names: dict[str, list[str]] = {}
    for name, row in case["rows"].items():
        if row["status"] != "measured":
            # In one line, and nothing of it is markup.
            reason = " ".join(row["reason"].split()).replace("`", "'")
            names.setdefault(f"{row['status']}: `{reason}`", []).append(name)
    listed = "; ".join(f"{', '.join(those)} ({why})" for why, those in names.items())
    return [f"No figure: {listed}.", ""] if names else []


def _used(case: Mapping[str, Any], columns: Sequence[Column]) -> list[Column]:
    """The columns that some row of the case fills; the first one at least."""
    rows = [row for row in case["rows"].values() if row["status"] == "measured"]
    return [column for column in columns if any(column[1](row) for row in rows)] or list(columns[:1])


def number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A cell that formats `row[name] * scale`, empty where the row has none."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else format(value * scale, form)

    return cell
