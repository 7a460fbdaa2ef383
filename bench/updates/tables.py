"""Results of bench/trainer_only.py for people: a table per case on the terminal, and Markdown for the README."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("trainer", "s / step", "spread", "x TRL", "action tokens / s", "gradients", "optimizer", "scoring", "apart")
"""Seconds of forward and backward passes with clipping, of the optimizer, and of a pass for log-probs (not in a step);
last the relative distance of all gradients from TRL's."""
WIDTH = 120
"""Characters of a line where there is no terminal to ask."""


def print_case(case: dict[str, Any], console: Console | None = None) -> None:
    """Print one case: a table of what was measured, and a line for each row without times."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    rows = case["rows"]
    measured = [name for name in rows if rows[name]["status"] == "measured"]
    if measured:
        table = Table(title=title(case))
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "trainer" else "right")
        for name in measured:
            table.add_row(*cells(name, rows[name]))
        console.print(table)
    for name in rows:
        if name not in measured:
            console.print(f"{case['name']}, {case['loss']}, {name}: {_remark(rows[name])}", markup=False)


def title(case: dict[str, Any]) -> str:
    """What the case is, in words."""
    batch = case["batch"]
    return (
        f"{case['name']}, loss {case['loss']}: {batch['sequences']} sequences, {batch['tokens']} tokens, "
        f"{batch['action_tokens']} of them actions ({batch['live_action_tokens']} with an advantage), "
        f"{batch['padded_tokens']} when padded"
    )


def cells(name: str, entry: dict[str, Any]) -> list[str]:
    """A measured row under COLUMNS."""
    phases = entry["phases_s"]
    return [
        name,
        f"{entry['median_s']:.3g}",
        f"{100 * entry['spread']:.0f} %",
        f"{entry['speedup']:.2f}" if "speedup" in entry else "-",
        f"{entry['action_tokens_per_s']:.0f}",
        f"{phases['gradients']:.3g}",
        f"{phases['optimizer']:.2g}",
        f"{entry['scoring_s']:.3g}",
        f"{entry['gate']['gradient']:.1e}" if "gate" in entry else "-",
    ]


def _remark(entry: dict[str, Any]) -> str:
    if gate := entry.get("gate"):
        apart = f"gradients {gate['gradient']:.1e} apart, loss {gate['loss']:.1e}"
        return f"{entry['status']}, {apart}" + (f"; {entry['reason']}" if "reason" in entry else "")
    reason = entry.get("reason", "").split("\n")[0]
    return f"{entry['status']}, {reason}" if reason else "what the others are compared with"


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown: times of each batch, and how far the gradients of each loss are apart."""
    measured = [case for case in result["cases"] if any("median_s" in entry for entry in case["rows"].values())]
    lines = []
    for case in measured:
        lines += [f"{title(case)}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for name, entry in case["rows"].items():
            if entry["status"] == "measured":
                lines.append(f"| {' | '.join(cells(name, entry))} |")
            else:
                lines.append(f"| {name} | {_remark(entry)} |{' |' * (len(COLUMNS) - 2)}")
        lines.append("")
    lines += [
        "| loss | batch | trainer | loss apart | gradients apart | worst parameter |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for name, entry in case["rows"].items():
            if gate := entry.get("gate"):
                worst = f"{gate['worst_gradient']:.1e} (`{gate['worst_parameter']}`)"
                facts = [case["loss"], case["name"], name, f"{gate['loss']:.1e}", f"{gate['gradient']:.1e}", worst]
                lines.append(f"| {' | '.join(facts)} |")
    machine = result["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    lines += [
        "",
        f"Relative distances to TRL's own. {machine['processor']}, {machine['cores']} cores, {gpus}, "
        f"{result['settings']['dtype']}, trl {machine['packages']['trl']}, torch {machine['packages']['torch']}, "
        f"commit {machine['commit']}.",
    ]
    return "\n".join(lines) + "\n"
