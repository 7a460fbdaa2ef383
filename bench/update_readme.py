"""Writes the README's measured parts from the files under bench/results/.

python bench/update_readme.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/cpu"


def main() -> None:
    """Rewrite README.md in place."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def updated(readme: str) -> str:
    """Return the README with every marked part replaced by what the result files say."""
    parts = {
        "quickstart-results": quickstart_table(json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))),
        "quickstart-output": fenced((RESULTS / "quickstart.txt").read_text(encoding="utf-8")),
        "test-output": fenced((RESULTS / "tests.txt").read_text(encoding="utf-8")),
    }
    for name, text in parts.items():
        part = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        readme, count = part.subn(lambda found, text=text: found[1] + text + found[2], readme)
        if count != 1:
            sys.exit(f"README.md needs exactly one part <!-- {name} --> ... <!-- end -->, it has {count}")
    return readme


def fenced(text: str) -> str:
    """Return terminal output as a code block."""
    return f"```text\n{text.rstrip()}\n```\n"


def quickstart_table(result: dict[str, Any]) -> str:
    """Return the seeds' held-out success before and after as a table with its provenance."""
    machine = result["machine"]
    lines = [
        "| seed | held-out success, cold-started | after SPEAR | rise | whole command without installation |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        cells = [
            str(run["seed"]),
            _rate(run["before"], run["before_interval"]),
            _rate(run["after"], run["after_interval"]),
            f"{100 * run['rise']:+.1f} points",
            f"{run['wall_s']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    lines.append("")
    lines.append(
        f"{result['runs'][0]['num_tasks']} held-out tasks, 95 % Wilson intervals in brackets. Written by "
        f"`bench/quickstart.py` at commit {machine['commit']} on {machine['cores']} cores of {machine['processor']}, "
        f"Python {machine['python']}, {versions}."
    )
    return "\n".join(lines) + "\n"


def _rate(rate: float, interval: list[float]) -> str:
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


if __name__ == "__main__":
    main()
