"""vLLM and FSDP2 on one GPU: twenty cycles of sleep, update and sync at the size of Qwen2.5-1.5B, and whole short runs.

Each engine has a process of its own, as in a run: what one leaves behind must not decide about the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["cold_start.steps=60", "cold_start.num_demos=512", "steps=3", "rollout.prompts_per_step=8"]
SHORT += ["eval.num_tasks=32", "checkpoint.every=0"]
"""The whole quickstart takes minutes; this much learns the format and passes through every phase."""


def run(*command: str) -> None:
    # vLLM itself may have been brought along in a folder of the path.
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=540
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("mode", "placement"), [("sleep1", "inproc"), ("sleep2", "inproc"), ("sleep2", "process"), ("resident", "inproc")]
)
def test_twenty_cycles_lose_no_memory_and_sample_what_is_trained(machine, tmp_path, mode, placement):
    out = tmp_path / "result.json"
    if machine.device == "cpu":
        options = ["--load", "tiny", "--mode", "resident", "--cycles", "3"]
    else:
        options = ["--load", "short", "--mode", mode, "--cycles", "20"]
    options += ["--device", machine.device, "--restart", "--set", f"engine.placement={placement}", "update.lr=1e-4"]
    if machine.device == "cuda":
        options.append("engine.kv_cache_mib=4096")  # large enough to be missed if it stayed
    run("bench/colocated.py", *options, "--out", str(out))
    result = json.loads(out.read_text())
    assert result["complaints"] == []
    cycles: list[dict[str, Any]] = result["cycles"]
    assert [cycle["sync"]["sync/version"] for cycle in cycles] == list(range(1, len(cycles) + 1))
    for verified in (cycles[0], cycles[-1]):
        assert verified["sync"]["sync/unverified"] == 0, "every parameter must be compared with the engine's"
    # A sync that did not arrive shows as a gap that grows with every update.
    assert max(cycle["gap"]["mean_nats"] for cycle in cycles) < 0.05
    assert result["restart"]["mean_nats"] < 0.05
    if machine.device == "cpu" or mode == "resident":
        return
    memory = [cycle["memory"] for cycle in cycles]
    assert abs(memory[-1]["asleep_bytes"] - memory[1]["asleep_bytes"]) <= 64 << 20
    held = memory[0]["weight_bytes"] + result["kv_cache_bytes"]
    assert all(one["awake_bytes"] - one["asleep_bytes"] >= held - (64 << 20) for one in memory)


@pytest.mark.parametrize(
    ("mode", "overrides"),
    [
        ("sleep2", []),
        ("sleep1", ["engine.enforce_eager=true"]),
        ("sleep2", ["engine.placement=process"]),
        ("offload", ["rollout.deterministic=false", "rollout.mode=partial"]),
    ],
)
def test_the_quickstart_trains_on_the_gpu_with_vllm(machine, tmp_path, mode, overrides):
    mode = "resident" if machine.device == "cpu" else mode
    settings = [f"device={machine.device}", "engine=vllm", "model.dtype=bfloat16", f"memory.mode={mode}"]
    where = [f"out={tmp_path}", "log.progress=plain"]
    config = str(ROOT / "configs/quickstart.yaml")
    run("-m", "spear_fast.cli", "train", config, *where, *SHORT, *settings, *overrides)
    lines = [json.loads(line) for line in (tmp_path / "quickstart/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert [line["sync/version"] for line in steps] == [1, 2, 3]
    assert all(line["sync/unverified"] == 0 for line in steps)
    assert all(line.get("update/logp_gap_nats", 0.0) < 0.1 for line in steps)
    assert sum(line["reward/tool_calls_mean"] for line in steps) > 0, "the format was learned before"
    assert all(line["rollout/status_ok_frac"] + line["rollout/status_truncated_frac"] == 1 for line in steps)
