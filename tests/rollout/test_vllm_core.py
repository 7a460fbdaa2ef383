"""What the vLLM core does around the engine: versions, order of sleep and wake, log-probs in either form."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import vllm
import vllm.envs
import vllm.logprobs

from spear_fast.errors import EngineError, MissingDependencyError
from spear_fast.rollout import vllm_compat
from spear_fast.rollout.vllm_core import CoreRequest, VllmCore
from spear_fast.rollout.weight_layout import WeightLayout


class RecordingEngine:
    """Stands for vLLM on a GPU, where sleeping does something."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held_blocks = 0
        self.engine_core = SimpleNamespace()

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def step(self) -> list[object]:
        self.held_blocks -= 1
        return []

    def reset_prefix_cache(self) -> bool:
        if self.held_blocks <= 0:
            self.calls.append("reset")
        return self.held_blocks <= 0

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def add_request(self, *_: object) -> None:
        self.calls.append("add")

    def has_unfinished_requests(self) -> bool:
        return False


def make_core(sleep_level: int) -> tuple[VllmCore, RecordingEngine, torch.nn.Linear]:
    core, engine, model = VllmCore.__new__(VllmCore), RecordingEngine(), torch.nn.Linear(2, 2)
    core._llm, core._device, core._sleep_level = engine, torch.device("cpu"), sleep_level
    core._ready = core._weights_asleep = core._cache_asleep = False
    core._layout = WeightLayout.of(model, {"weight": (2, 2), "bias": (2,)})
    return core, engine, model


def load(core: VllmCore) -> None:
    core.begin_load()
    core.write("weight", torch.ones(2, 2))
    core.write("bias", torch.ones(2))
    assert core.finish_load() == set()


def ask(core: VllmCore) -> None:
    core.advance([CoreRequest(1, [1], 1, 1.0, (), 0, 1.0)], lambda: False)


@pytest.mark.parametrize("level", [1, 2])
def test_weights_wake_before_the_cache_and_take_the_push_in_between(level):
    core, engine, _ = make_core(level)
    load(core)
    core.sleep()
    engine.calls.clear()
    with pytest.raises(EngineError, match="sleep"):
        core.weights_digest()
    load(core)
    assert engine.calls == ["wake weights", "reset"]
    with pytest.raises(EngineError, match="sleeps; wake it"):
        ask(core)
    core.wake()
    assert engine.calls == ["wake weights", "reset", "wake kv_cache", "reset"]
    ask(core)


def test_weights_that_were_dropped_are_never_sampled_from():
    for level in (0, 1, 2):
        core, engine, _ = make_core(level)
        with pytest.raises(EngineError, match="no complete weights"):
            ask(core)
        load(core)
        core.sleep()
        core.sleep()
        assert engine.calls.count(f"sleep {level}") == (level > 0)
        core.wake()
        if level == 2:
            with pytest.raises(EngineError, match="no complete weights"):
                ask(core)
            load(core)
        ask(core)


def test_a_cache_that_requests_hold_on_to_is_waited_for_but_not_forever():
    core, engine, _ = make_core(0)
    engine.held_blocks = 2  # as asynchronous scheduling leaves them
    load(core)
    assert engine.calls == ["reset"]
    engine.held_blocks = 100
    with pytest.raises(EngineError, match="did not drop its cache"):
        load(core)


class Pool:
    """Stands for one of torch's memory pools, whose end frees what it caches."""


@pytest.mark.parametrize("listed", [False, True])
def test_an_engine_that_ends_asleep_is_woken_and_its_memory_pools_end_before_their_allocators(monkeypatch, listed):
    core, engine, _ = make_core(2)
    load(core)
    core.sleep()
    pool, allocator = Pool(), Pool()
    entry = (pool, allocator)
    ends: list[str] = []
    weakref.finalize(pool, lambda: ends.append("pool"))
    weakref.finalize(allocator, lambda: ends.append("allocator"))
    cumem = SimpleNamespace(allocator_and_pools={"weights": [entry] if listed else entry})
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=cumem))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    engine.engine_core = SimpleNamespace(shutdown=lambda: engine.calls.append("shutdown"))
    del entry, pool, allocator
    core.close()
    assert engine.calls[-4:-1] == ["wake weights", "wake kv_cache", "reset"] and engine.calls[-1] == "shutdown"
    assert cumem.allocator_and_pools == {} and ends == ["pool"]


@pytest.mark.parametrize("version", ["0.23.9", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(EngineError, match=rf"vLLM {version} is installed, but engine.name=vllm knows 0.24 to 0.33"):
        vllm_compat.import_vllm()


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0+cpu", "0.33.1rc1"])
def test_known_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    vllm_compat.import_vllm()
    assert not vllm.envs.VLLM_USE_FLASHINFER_SAMPLER


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[vllm\]"):
        vllm_compat.require_package()


def test_logps_are_read_in_both_forms_and_missing_ones_are_not_numbers():
    flat = vllm.logprobs.FlatLogprobs()
    for entry in ({7: vllm.logprobs.Logprob(-1.5)}, None, {9: vllm.logprobs.Logprob(-0.5)}):
        flat.append(entry)
    listed = [{7: vllm.logprobs.Logprob(-1.5)}, None, {8: vllm.logprobs.Logprob(-3.0), 9: vllm.logprobs.Logprob(-0.5)}]
    for logprobs in (flat, listed):
        values = vllm_compat.sampled_logps(SimpleNamespace(token_ids=[7, 8, 9], logprobs=logprobs))
        assert values[0] == -1.5 and values[1] != values[1] and values[2] == -0.5
    absent = vllm_compat.sampled_logps(SimpleNamespace(token_ids=[7], logprobs=None))
    assert len(absent) == 1 and absent[0] != absent[0]


def test_nothing_but_temperature_and_top_p_shapes_the_distribution():
    params = vllm_compat.sampling_params(5, 0.7, (3,), seed=2**63 - 1, top_p=0.9)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 0, 0.0)
    assert (params.stop_token_ids, params.ignore_eos, params.logprobs, params.detokenize) == ([3], True, 0, False)
    assert params.seed == 2**63 - 1 and params.max_tokens == 5
