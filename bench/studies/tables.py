"""A study's result as Markdown: success of every arm, what SPEAR adds to each baseline, and what each part is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from bench.common.markdown import markdown_table
from bench.studies import arms
from bench.studies.intervals import paired_difference
from spear_fast.statistics import wilson

Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """Return the tables of one task family."""
    runs = result["runs"]
    parts = [_arms(result, runs), _gains(runs)]
    ablated = [name for name in arms.ABLATIONS if f"{arms.ABLATED}+spear:{name}" in runs]
    if ablated:
        parts.append(_ablations(runs, ablated))
    return "\n".join(part for part in parts if part)


def _arms(result: Result, runs: Result) -> str:
    rows = []
    for arm in (arm for arm in runs if ":" not in arm):
        seeds = list(runs[arm].values())
        after = [run["after"] for run in seeds]
        rows.append(
            [
                title(arm),
                _pooled(seeds),
                " / ".join(f"{100 * rate:.1f}" for rate in after),
                f"{mean(run['evaluations'][-1]['turns'] for run in seeds):.1f}",
                f"{mean(run['training_steps'] for run in seeds):.0f}",
                f"{mean(run['replayed'] for run in seeds):.0f}",
            ]
        )
    start = [run["before"] for run in next(iter(runs.values())).values()]
    titles = ["", "held-out success", "each seed", "turns", "training steps", "replayed rows"]
    head = f"Cold-started: {' / '.join(f'{100 * rate:.1f}' for rate in start)} % on the seeds {_names(runs)}; "
    return f"{head}{result['env_steps']} environment steps for each run.\n\n{markdown_table(titles, rows)}"


def _gains(runs: Result) -> str:
    rows = []
    for baseline in arms.BASELINES:
        plain, added = arms.pair(baseline)
        if plain in runs and added in runs:
            rows.append([arms.TITLES[baseline], *_difference(runs[plain], runs[added])])
    return (
        markdown_table(["what SPEAR adds to", "points of held-out success", "95 % interval over seeds"], rows)
        if rows
        else ""
    )


def _ablations(runs: Result, names: Sequence[str]) -> str:
    full = f"{arms.ABLATED}+spear"
    rows = [
        [
            f"without {arms.ABLATIONS[name][0]}",
            _pooled(list(runs[f"{full}:{name}"].values())),
            *_difference(runs[full], runs[f"{full}:{name}"]),
        ]
        for name in names
    ]
    return markdown_table(
        [f"{title(full)}", "held-out success", "points against all parts", "95 % interval over seeds"], rows
    )


def title(arm: str) -> str:
    """Return an arm's name as people write it, e.g. "Dr.BoT (GiGPO) + SPEAR without Clip-Cov"."""
    name, _, ablation = arm.partition(":")
    baseline, _, added = name.partition("+")
    without = f" without {arms.ABLATIONS[ablation][0]}" if ablation else ""
    return arms.TITLES[baseline] + (" + SPEAR" if added else "") + without


def _pooled(runs: Sequence[Result]) -> str:
    """Success over the tasks of all seeds, with its Wilson interval."""
    trials = sum(run["num_tasks"] for run in runs)
    solved = round(sum(run["after"] * run["num_tasks"] for run in runs))
    low, high = wilson(solved, trials)
    return f"{100 * solved / trials:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(first: Result, second: Result) -> list[str]:
    seeds = [seed for seed in first if seed in second]
    centre, interval = paired_difference([first[s]["after"] for s in seeds], [second[s]["after"] for s in seeds])
    shown = "" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return [f"{100 * centre:+.1f}", shown]


def _names(runs: Result) -> str:
    return ", ".join(next(iter(runs.values())))
