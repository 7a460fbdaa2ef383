"""Time of the operators on packed batches: advantages, recalibration and the repetition filter, at a million tokens.

python bench/batch_ops.py --out bench/results/cpu/batch_ops.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.machine import ROOT, describe_machine
from spear_kernels.discounted_return import discounted_returns
from spear_kernels.group_advantage import group_advantages
from spear_kernels.recalibrate import recalibrated_advantages
from spear_kernels.repetition import max_ngram_counts
from spear_kernels.spans import span_index, spread
from spear_kernels.step_advantage import step_advantages

VOCABULARY = 151_936
GROUP, TURN, STEPS, BASELINE = 16, 32, 50, 10_240
"""Samples per prompt, tokens per turn, steps per episode, groups in the reward baseline."""

Work = Callable[[], object]


def main() -> None:
    """Time every operator, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice by default")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu/batch_ops.json")
    args = parser.parse_args()
    machine = describe_machine()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.device(args.device):
        works = {**advantage_works(args.sequences, args.length), **repetition_works(args.sequences, args.length)}
    load = os.getloadavg()[0]
    rows = [timed(name, work, args.repeats, args.device) for name, work in works.items()]
    result = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "sequences": args.sequences,
        "tokens": args.sequences * args.length,
        "load_average_before": load,
        "operators": rows,
        "machine": machine,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def timed(name: str, work: Work, repeats: int, device: str) -> dict[str, object]:
    """Return seconds by the wall clock and of processor time (all threads, spinning included) after one warm-up call.

    On a machine busy with other processes the wall clock tells of them; processor time on one thread does so less.
    """
    wall, processor = [], []
    for _ in range(repeats + 1):
        _wait(device)
        started, started_processor = time.perf_counter(), time.process_time()
        work()
        _wait(device)
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - started_processor)
    row = {"operator": name, "median_s": median(wall[1:]), "median_processor_s": median(processor[1:])}
    wall_ms, processor_ms = 1000 * row["median_s"], 1000 * row["median_processor_s"]
    print(f"{name:68s} {wall_ms:8.1f} ms, processor {processor_ms:8.1f} ms", flush=True)
    return {**row, "repeats_s": wall[1:]}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def advantage_works(sequences: int, length: int) -> dict[str, Work]:
    """Return advantages at the size of a batch, and each operator with as many rows as the batch has tokens."""
    tokens = sequences * length
    starts, mask = torch.arange(0, tokens, length), torch.rand(tokens) < 0.7
    turn_starts = torch.arange(0, tokens, TURN)
    turn_owner = turn_starts // length
    rewards, groups = torch.rand(sequences).double(), torch.arange(sequences) // GROUP
    turn_rewards = torch.rand(len(turn_starts)).double()
    turn_anchors = torch.randint(-1, len(turn_starts) // 8, (len(turn_starts),))
    many, owners = torch.rand(tokens).double(), torch.arange(tokens)
    anchors, baseline = torch.randint(-1, tokens // 16, (tokens,)), torch.rand(2, BASELINE).double()

    def grpo() -> torch.Tensor:
        advantages = group_advantages(rewards, groups, std_norm=True)
        return spread(advantages.float(), span_index(starts, starts + length, tokens), mask)

    def gigpo() -> torch.Tensor:
        episode = group_advantages(rewards, groups, std_norm=True)[turn_owner]
        steps = step_advantages(discounted_returns(turn_rewards, turn_owner, 0.95), turn_anchors, std_norm=True)
        return spread((episode + steps).float(), span_index(turn_starts, turn_starts + TURN, tokens), mask)

    return {
        f"GRPO: {sequences} sequences, advantages on tokens": grpo,
        f"GiGPO: {len(turn_starts)} turns, advantages on tokens": gigpo,
        f"group_advantages: {tokens} samples in groups of {GROUP}": lambda: group_advantages(
            many, owners // GROUP, std_norm=True
        ),
        f"discounted_returns: {tokens} steps, {STEPS} per episode": lambda: discounted_returns(
            many, owners // STEPS, 0.95
        ),
        f"step_advantages: {tokens} steps, 16 per state": lambda: step_advantages(many, anchors, std_norm=True),
        f"recalibrated_advantages: {tokens} rows, {BASELINE} groups": lambda: recalibrated_advantages(
            many, baseline[0], baseline[1], many - 0.5
        ),
    }


def repetition_works(sequences: int, length: int) -> dict[str, Work]:
    """Return exact counts (enough=1) and the filter's question (enough=10) for texts from random to one token."""
    tokens = sequences * length
    seq_ids = torch.arange(sequences).repeat_interleave(length)
    uniform = torch.randint(VOCABULARY, (tokens,))
    phrases = torch.randint(VOCABULARY, (sequences, 64)).repeat(1, length // 64).reshape(-1)
    texts = {
        "uniform ids": uniform,
        "ids of density 1/id": (VOCABULARY ** torch.rand(tokens).double()).long(),
        "64 tokens over and over": phrases,
        "64 over and over, 2 % replaced": torch.where(torch.rand(tokens) < 0.02, uniform, phrases),
        "one token": torch.full((tokens,), 7),
    }
    return {
        f"max_ngram_counts: {name}, enough={enough}": lambda ids=ids, enough=enough: max_ngram_counts(
            ids, seq_ids, num_seqs=sequences, enough=enough
        )
        for name, ids in texts.items()
        for enough in (1, 10)
    }


if __name__ == "__main__":
    main()
