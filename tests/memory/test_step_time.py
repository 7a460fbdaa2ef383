"""Predicted step times: the formulas by hand, where rates come from, and the order of magnitude of a measured run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear_fast.config.load import load_config
from spear_fast.errors import ConfigError
from spear_fast.memory.gpus import DATASHEET, FROM_DATASHEET, Gpu, Rate, load_gpu
from spear_fast.memory.plan import plan_memory
from spear_fast.memory.shapes import ModelShape, find_shape
from spear_fast.memory.step_time import Phase, StepTime, Workload

ROOT = Path(__file__).parents[2]
# Parameters in matrices of a block: q 8x8, k and v 8x4, o 8x8, feed-forward 3 x 8x16.
SMALL = ModelShape("llama", 8, 2, 2, 1, 4, 16, 100)
MATRICES = 64 + 32 + 32 + 64 + 3 * 128
BASE: dict[str, Any] = {
    "name": "run",
    "steps": 1,
    "task": {"name": "guess"},
    "model": {"path": "somewhere"},
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 64, "max_turn_tokens": 32},
    "update": {"token_budget": 64},
}
DEVICE = Gpu(
    name="test",
    memory_bytes=1 << 40,
    gpus_per_node=2,
    matmul_flops=Rate(1e6, "measured"),
    train_flops=Rate(1e5, "measured"),
    memory_bandwidth=Rate(1e30, "measured"),
    link_bandwidth=Rate(1e30, "measured"),
    nic_bandwidth=Rate(1e30, "measured"),
    host_bandwidth=Rate(1e30, "measured"),
    layer_s=Rate(0.0, "measured"),
)
WORK = Workload(tokens=40, sampled=20)


def phases(*overrides: str, gpu: Gpu = DEVICE, ranks: int = 1, work: Workload = WORK) -> dict[str, Phase]:
    config = load_config(None, overrides, BASE)
    plan = plan_memory(SMALL, config, ranks, gpu.memory_bytes)
    return {phase.name: phase for phase in StepTime(SMALL, config, ranks, gpu, plan, work).phases()}


def test_products_are_counted_by_the_formulas() -> None:
    """16 trajectories of 40 tokens, 20 sampled; a token's forward pass costs 2 blocks x (2 N + 2 A L)."""
    forward = 2 * (2 * MATRICES + 2 * 8 * 40)
    head = 2 * 8 * 100
    found = phases("update.old_logp=recompute")
    assert found["rollout"].seconds == pytest.approx((16 * 20 * forward + 20 * 16 * (forward + head)) / 1e6)
    assert found["old log-probs"].seconds == pytest.approx((16 * 40 * forward + 16 * 20 * head) / 1e5)
    update = 3 * (16 * 40 * forward + 16 * 20 * head) / 1e5
    assert found["update"].seconds == pytest.approx(update)
    assert found["step"].seconds == pytest.approx(sum(found[n].seconds for n in ("rollout", "old log-probs", "update")))
    twice = phases("update.epochs=2", "update.old_logp=sampler")["update"].seconds
    assert twice == pytest.approx(2 * update)
    recomputed = phases("parallel.activation_checkpointing=true")["update"].seconds
    assert recomputed == pytest.approx(update + 16 * 40 * forward / 1e5)
    adapters = phases("model.lora.rank=1")["update"].seconds
    assert adapters == pytest.approx(2 * (16 * 40 * forward + 16 * 20 * head) / 1e5)
    # Clip-Cov chooses over the mini-batch: one more forward pass, through the trunk too with several micro-batches.
    chosen = phases("algo.loss.kind=clip_cov")["update"].seconds
    assert chosen == pytest.approx(update + (16 * 40 * forward + 16 * 20 * head) / 1e5)
    in_one = phases("algo.loss.kind=clip_cov", "update.token_budget=1024")["update"].seconds
    assert in_one == pytest.approx(update + 16 * 20 * head / 1e5)
    assert phases(ranks=4)["update"].seconds == pytest.approx(update / 4)


def test_decoding_is_bound_by_the_bytes_it_reads() -> None:
    """Weights without the embedding's own rows, and keys and values of half a trajectory each; float32."""
    slow = replace(DEVICE, memory_bandwidth=Rate(1e3, "measured"), matmul_flops=Rate(1e30, "measured"))
    weights = 4 * (2 * SMALL.block_parameters + 800)
    kv = 2 * 2 * 4 * 4
    found = phases(gpu=slow)["rollout"]
    assert found.seconds == pytest.approx(20 * (weights + 16 * kv * 20) / 1e3)
    assert found.bound == "reading weights and KV cache"
    # Half as many at once: each pass reads less, but there are twice as many.
    fewer = phases("rollout.max_concurrent=8", gpu=slow)["rollout"].seconds
    assert fewer == pytest.approx(2 * 20 * (weights + 8 * kv * 20) / 1e3)


def test_communication_counts_where_it_cannot_hide() -> None:
    slow = replace(DEVICE, link_bandwidth=Rate(1e3, "measured"), train_flops=Rate(1e30, "measured"))
    found = phases("update.token_budget=256", gpu=slow, ranks=2)["update"]
    # 8 trajectories of 40 tokens are two micro-batches: blocks gathered twice, root once, gradients reduced.
    root = 2 * 800 + 8
    moved = 2 * (4 * (2 * 2 * SMALL.block_parameters + root) + 4 * SMALL.num_parameters) / 2
    assert (found.seconds, found.bound) == (pytest.approx(moved / 1e3), "communication")
    once = phases("update.token_budget=256", "parallel.reduce_gradients=step", gpu=slow, ranks=2)["update"].seconds
    assert once == pytest.approx(moved / 1e3 - 4 * SMALL.num_parameters / 2 / 1e3)


def test_a_ring_over_nodes_uses_every_network_adapter() -> None:
    gpu = load_gpu("h200-141g")
    assert gpu.group_bandwidth(8).value == gpu.link_bandwidth.value
    assert gpu.group_bandwidth(16).value == 8 * gpu.nic_bandwidth.value < gpu.link_bandwidth.value


def test_launches_bound_small_models_on_eager_engines() -> None:
    slow = replace(DEVICE, layer_s=Rate(1.0, "measured"))
    assert phases(gpu=slow)["rollout"].seconds == pytest.approx(20 * 2, rel=0.2)
    assert phases("engine=vllm", gpu=slow)["rollout"] == phases("engine=vllm")["rollout"]
    assert phases("engine=vllm", "engine.enforce_eager=true", gpu=slow)["rollout"].bound == "launches"


def test_every_figure_of_a_datasheet_says_so(tmp_path: Path) -> None:
    found = phases("algo.preset=spear", gpu=load_gpu("h200-141g"), ranks=8)
    assert {phase.source for phase in found.values()} == {FROM_DATASHEET}
    file = tmp_path / "coefficients.json"
    rates = {"matmul_flops": 5e14, "train_flops": 4e14, "memory_bandwidth": 4e12, "layer_s": 1e-4}
    file.write_text(json.dumps({"gpu": "h200-141g", "coefficients": rates}))
    found = phases("algo.preset=spear", gpu=load_gpu("h200-141g", file))
    assert {phase.source for phase in found.values()} == {f"measured ({file})"}
    # Links were not measured, so what needs them still is the vendor's.
    found = phases(gpu=load_gpu("h200-141g", file), ranks=8)
    assert found["update"].source == found["step"].source == FROM_DATASHEET
    assert found["rollout"].source == f"measured ({file})"


def test_the_datasheet_is_complete() -> None:
    for name in json.loads(DATASHEET.read_text()):
        gpu = load_gpu(name)
        assert all(getattr(gpu, rate).value > 1e9 for rate in ("matmul_flops", "memory_bandwidth", "link_bandwidth"))
        assert gpu.train_flops == gpu.matmul_flops and gpu.memory_bytes > 1e9


def test_unknown_gpus_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--gpu h300: no such GPU; known: a100-80g, .*h200-141g"):
        load_gpu("h300")
    file = tmp_path / "coefficients.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_gpu("h200-141g", file)
    file.write_text('{"gpu": "h100-80g"}')
    with pytest.raises(ConfigError, match=r"not a file that bench/calibrate.py wrote"):
        load_gpu("h200-141g", file)
    file.write_text('{"gpu": "h100-80g", "coefficients": {}}')
    with pytest.raises(ConfigError, match="about 'h100-80g', not --gpu h200-141g"):
        load_gpu("h200-141g", file)


@pytest.mark.parametrize("parallel", [{}, {"replicate": 2}])
def test_ranks_without_a_known_link_are_told_to_measure_it(parallel: dict[str, int]) -> None:
    config = load_config(None, [], BASE | {"parallel": parallel})
    nothing = Rate(0.0, FROM_DATASHEET)
    gpu = replace(DEVICE, gpus_per_node=1, link_bandwidth=nothing, nic_bandwidth=nothing)
    plan = plan_memory(SMALL, config, 2, gpu.memory_bytes)
    with pytest.raises(ConfigError, match=r"bench/calibrate\.py under torchrun"):
        StepTime(SMALL, config, 2, gpu, plan, Workload.assumed(config)).phases()


def test_the_quickstart_is_predicted_to_its_order_of_magnitude() -> None:
    """From the rates of this project's CPU results, against the times of its quickstart there."""
    coefficients = ROOT / "bench/results/cpu/coefficients.json"
    config = load_config(ROOT / "configs/quickstart.yaml")
    gpu = load_gpu("cpu", coefficients)
    shape = find_shape(None, config.model.init)
    plan = plan_memory(shape, config, 1, gpu.memory_bytes, on_cpu=True)
    found = StepTime(shape, config, 1, gpu, plan, Workload.assumed(config)).phases()
    predicted = {phase.name: phase.seconds for phase in found}
    runs = json.loads((ROOT / "bench/results/cpu/quickstart.json").read_text())["runs"]
    for phase in ("rollout", "update"):
        measured = sum(run[f"{phase}_s"] / run["training_steps"] for run in runs) / len(runs)
        assert measured / 5 < predicted[phase] < measured * 5
