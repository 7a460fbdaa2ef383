"""The results of the step benchmark as tables: for the terminal, and in Markdown for the README."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.steps.phases import PHASES

WHAT_THEY_ARE = {
    "ours": "this trainer, hf engine",
    "ours-vllm": "this trainer, vLLM",
    "trl": "TRL, transformers",
    "trl-liger": "TRL, transformers, Liger",
    "trl-vllm": "TRL, vLLM colocated",
}
HEADER = ("row", "step s", "spread", *PHASES, "useful tokens/s", "of TRL's best")


def table(case: dict[str, Any]) -> str:
    """One workload for the terminal: seconds of a step, of its phases, and useful tokens per second."""
    grid = Table(title=f"{case['workload']}: {case['script']['action_tokens']} action tokens a step")
    for place, column in enumerate(HEADER):
        grid.add_column(column, justify="right" if place else "left")
    notes = []
    for name, row in case["rows"].items():
        if row["status"] == "measured":
            grid.add_row(*_cells(case, name))
        else:
            notes.append(f"{WHAT_THEY_ARE[name]}: {_why(row)}\n")
    console = Console(width=160)
    with console.capture() as captured:
        console.print(grid)
    return captured.get() + "".join(notes)


def markdown(result: dict[str, Any]) -> str:
    """All workloads of a result file as one table; rows that were not measured say why below it."""
    lines = ["| workload | " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * (len(HEADER) - 1)]
    notes = []
    for case in result["cases"]:
        for name, row in case["rows"].items():
            if row["status"] == "measured":
                lines.append(f"| {case['workload']} | " + " | ".join(_cells(case, name)) + " |")
            else:
                notes.append(f"- {case['workload']}, {WHAT_THEY_ARE[name]}: {_why(row)}")
    return "\n".join(lines + ([""] if notes else []) + notes)


def _cells(case: dict[str, Any], name: str) -> list[str]:
    row = case["rows"][name]
    best = case.get("best_of_trl")
    against = row["useful_tokens_per_s"] / case["rows"][best]["useful_tokens_per_s"] if best else None
    return [
        WHAT_THEY_ARE[name],
        f"{row['median_s']:.2f}",
        f"{row['spread']:.0%}",
        *(f"{row['phases'][phase]:.2f}" for phase in PHASES),
        f"{row['useful_tokens_per_s']:.0f}",
        "" if against is None else f"{against:.2f}",
    ]


def _why(row: dict[str, Any]) -> str:
    first = str(row["reason"]).splitlines()[0]
    return f"{row['status']}: {first if len(first) <= 160 else first[:157] + '...'}"
