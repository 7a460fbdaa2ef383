"""The memory plan: its arithmetic, the mode it chooses, and what it says when nothing fits."""

from __future__ import annotations

from typing import Any

import pytest

from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.errors import ConfigError
from spear_fast.memory.plan import GIB, MODES, MemoryPlan, plan_memory
from spear_fast.memory.shapes import ModelShape

QWEN_7B = ModelShape("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, qkv_bias=True)
BASE: dict[str, Any] = {
    "name": "run",
    "steps": 1,
    "task": {"name": "guess"},
    "model": {"path": "somewhere", "dtype": "bfloat16"},
    "engine": {"name": "vllm"},
    "rollout": {"prompts_per_step": 32, "max_tokens": 8192, "max_turn_tokens": 512},
    "update": {"token_budget": 16384},
    "parallel": {"activation_checkpointing": True},
}
PER_TOKEN = 28 * 2 * 512 * 2
"""Bytes of a token in the cache of QWEN_7B: layers, keys and values, width, bfloat16."""


def cache_of(trajectories: int) -> int:
    """Whole blocks for so many of the longest trajectories, and one more."""
    return (trajectories * 8192 + 128) * PER_TOKEN


def config_of(*overrides: str) -> RunConfig:
    return load_config(None, overrides, BASE)


def plan(*overrides: str, gib: float = 10_000, ranks: int = 8, **options: Any) -> MemoryPlan:
    return plan_memory(QWEN_7B, config_of(*overrides), ranks, int(gib * GIB), **options)


def test_the_arithmetic_of_a_known_model() -> None:
    """Qwen2.5-7B over 8 ranks; 32 prompts x 8 make 32 trajectories on each."""
    found = plan()
    parameters = 7_615_616_512
    assert QWEN_7B.num_parameters == parameters
    update, rollout, sync = (found.phases[phase] for phase in ("update", "rollout", "sync"))
    assert update["master weights"] == update["gradients"] == 4 * parameters // 8
    assert update["optimizer state"] == rollout["optimizer state"] == 8 * parameters // 8
    assert rollout["engine weights"] == 2 * parameters
    assert rollout["KV cache"] == found.kv_cache_bytes == cache_of(32)
    assert sync["sync bucket"] == GIB + GIB // 8, "what is gathered, and the shard that is sent"
    root, block = 2 * 152064 * 3584 + 3584, QWEN_7B.block_parameters
    assert update["gathered weights"] == 2 * (root + 2 * block)
    # Per token and block: norms 2 * (4 + 2 + 2) H, attention 2 (3 * 3584 + 2 * 512) + 4 * 28, feed-forward 8 I.
    per_token = 16 * 3584 + 2 * (3 * 3584 + 2 * 512) + 4 * 28 + 8 * 18944
    workspace = 2 * (3 * 18944 + 2 * 3584)
    assert update["activations"] == 16384 * (28 * 2 * 3584 + per_token + 6 * 3584 + workspace)
    # A GiB of logits, hidden states and their gradient, the head's gradient in float32 and rounded to bfloat16.
    assert update["head: logits, gradients"] == GIB + 2 * 2 * 16384 * 3584 + (4 + 2) * 152064 * 3584
    assert (found.mode, found.host_bytes, found.reserve_bytes) == ("resident", 0, 4 * GIB)
    assert found.total("update") == sum(update.values()) + 4 * GIB


def test_auto_becomes_more_frugal_as_the_gpu_shrinks() -> None:
    def modes(host_gib: int) -> list[str]:
        seen: list[str] = []
        for gib in range(120, 20, -1):
            try:
                found = plan("update.token_budget=8192", gib=gib, host_bytes=host_gib * GIB)
            except ConfigError:
                break
            assert found.fits and found.kv_cache_bytes >= cache_of(1)
            seen += [found.mode] if found.mode not in seen[-1:] else []
        return seen

    assert modes(100) == ["resident", "sleep1", "offload"]
    # CPU memory of 12 GiB holds a rank's share of the trainer, 10.6 GiB, but not the engine's weights of 14.2 GiB.
    assert modes(12) == ["resident", "sleep2", "offload"]
    assert modes(5) == ["resident", "sleep2"]


def test_a_mode_that_starves_the_engine_is_not_taken_while_another_feeds_it() -> None:
    tight = plan("memory.mode=resident").total("update") - plan().kv_cache_bytes
    at_least = tight / GIB + 1
    assert plan("memory.mode=resident", gib=at_least).kv_cache_bytes < plan(gib=at_least).kv_cache_bytes
    assert plan(gib=at_least).mode == "sleep1"


@pytest.mark.parametrize("mode", MODES)
def test_an_explicit_mode_is_kept_or_refused(mode: str) -> None:
    assert plan(f"memory.mode={mode}").mode == mode
    with pytest.raises(ConfigError, match=f"memory.mode={mode} does not fit: the"):
        plan(f"memory.mode={mode}", gib=8)


def test_what_each_mode_moves() -> None:
    plans = {mode: plan(f"memory.mode={mode}") for mode in MODES}
    engine, state = 2 * QWEN_7B.num_parameters, 12 * QWEN_7B.num_parameters // 8
    assert {mode: found.host_bytes for mode, found in plans.items()} == {
        "resident": 0, "sleep1": engine, "sleep2": 0, "offload": state
    }  # fmt: skip
    assert all(("KV cache" in found.phases["update"]) for found in plans.values())
    assert [found.phases["update"]["KV cache"] > 0 for found in plans.values()] == [True, False, False, False]
    assert plans["sleep2"].phases["update"]["engine weights"] == 0
    assert plans["offload"].phases["rollout"]["master weights"] == 0
    assert plans["offload"].phases["sync"]["master weights"] > 0


def test_a_refusal_names_the_phase_the_excess_and_remedies_that_work() -> None:
    """Every remedy that is called enough alone is applied, and the plan fits then; the others do not."""
    overrides = ["parallel.activation_checkpointing=false", "update.token_budget=32768", "memory.reserve_gib=2"]
    with pytest.raises(ConfigError) as caught:
        plan(*overrides, gib=100)
    text = str(caught.value)
    assert "the update phase needs" in text and "GiB too many" in text and "activations" in text
    lines = [line.strip(" -") for line in text.splitlines() if line.startswith("  - ")]
    order = ["parallel.activation_checkpointing=true", "update.token_budget=", "more GPUs", "parallel.cpu_offload"]
    assert [next(i for i, line in enumerate(lines) if line.startswith(key)) for key in order] == [0, 1, 2, 3]
    for line in lines:
        change, _, verdict = line.partition(" (")
        if "=" in change:
            if verdict.startswith("enough"):
                plan(*overrides, change, gib=100)
            else:
                with pytest.raises(ConfigError):
                    plan(*overrides, change, gib=100)
    assert any("(enough alone)" in line for line in lines) and any("(not enough alone)" in line for line in lines)


def test_a_token_budget_below_the_longest_trajectory_is_never_proposed() -> None:
    with pytest.raises(ConfigError, match=r"update.token_budget=8192 \(not enough alone\)"):
        plan("update.token_budget=20000", gib=10)


def test_the_cache_is_what_is_asked_for_and_at_least_one_trajectory() -> None:
    assert plan("engine.kv_cache_mib=2048").kv_cache_bytes == 2 * GIB
    with pytest.raises(ConfigError, match=r"engine.kv_cache_mib=100 holds no trajectory.*455 MiB"):
        plan("engine.kv_cache_mib=100")
    with pytest.raises(ConfigError, match=r"the rollout phase[\s\S]*engine.kv_cache_mib=null \(enough alone\)"):
        plan("engine.kv_cache_mib=200000", gib=80)
    assert plan("rollout.max_concurrent=4").kv_cache_bytes == cache_of(4)
    # With "partial", half as many groups again are in flight.
    assert plan("rollout.mode=partial").kv_cache_bytes == cache_of(48)


def test_settings_move_the_bytes_they_are_about() -> None:
    plain = plan().phases["update"]
    offloaded = plan("parallel.cpu_offload=true")
    moved = ("master weights", "gradients", "optimizer state")
    assert [offloaded.phases["update"][name] for name in moved] == [0, 0, 0]
    assert offloaded.host_bytes == sum(plain[name] for name in moved)
    adapters = plan("model.lora.rank=8").phases["update"]
    assert adapters["optimizer state"] == 2 * adapters["gradients"] < plain["gradients"] // 100
    assert plan("parallel.reduce_gradients=step").phases["update"]["gradients"] == 4 * QWEN_7B.num_parameters
    halves = plan("parallel.replicate=2").phases["update"]
    assert halves["master weights"] == 2 * plain["master weights"]
    kept = plan("parallel.reshard_after_forward=false").phases["update"]["gathered weights"]
    assert kept == 2 * QWEN_7B.num_parameters
    # What is frozen is kept in bfloat16.
    assert plan("algo.loss.kl_coef=0.1").phases["update"]["reference policy"] == plain["master weights"] // 2
    assert adapters["master weights"] == plain["master weights"] // 2 + adapters["gradients"]
    alone = plan("model.dtype=float32", ranks=1).phases["update"]
    assert alone["gathered weights"] == alone["gradients being reduced"] == 0


def test_on_the_cpu_nothing_sleeps_and_the_cache_is_modest() -> None:
    found = plan("model.dtype=float32", gib=1000, ranks=1, on_cpu=True)
    assert (found.mode, found.reserve_bytes, found.kv_cache_bytes) == ("resident", 0, GIB)
    with pytest.raises(ConfigError, match="of this machine"):
        plan("model.dtype=float32", gib=10, ranks=1, on_cpu=True)


def test_gpu_memory_can_be_given_in_the_configuration() -> None:
    assert plan("memory.gpu_gib=141.5").capacity_bytes == int(141.5 * GIB)


def test_ranks_must_be_a_multiple_of_replicas() -> None:
    with pytest.raises(ConfigError, match=r"parallel.replicate=3 does not divide 8"):
        plan("parallel.replicate=3")


def test_rows_are_a_table() -> None:
    rows = plan().as_rows()
    assert rows[0] == ("GiB on one rank", "rollout", "sync", "update")
    assert {len(row) for row in rows} == {4}
    table = {row[0]: row[1:] for row in rows}
    assert table["gradients"] == ("0.0", "0.0", f"{4 * QWEN_7B.num_parameters / 8 / GIB:.1f}")
    assert "reference policy" not in table


def test_an_engine_in_its_own_process_has_a_bucket_of_its_own() -> None:
    inproc, own = (
        plan("engine.name=vllm", f"engine.placement={placement}").phases["sync"]["sync bucket"]
        for placement in ("inproc", "process")
    )
    assert own == inproc + GIB
