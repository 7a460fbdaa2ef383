"""The push on one rank: direct, versioned, and fatal where the engine does not hold what was pushed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spear_fast.errors import EngineError
from spear_fast.sync.buckets import weight_buckets
from spear_fast.sync.push import push_weights
from tests.sync.recorder import Recorder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"embed.weight": torch.randn(5, 4), "norm.weight": torch.randn(4), "gate.weight": torch.randn(6, 4)}


def push(weights: dict[str, torch.Tensor], engine: Recorder, version: int = 1, **changes: Any) -> dict[str, float]:
    settings = {"dtype": engine.dtype, "bucket_bytes": 1 << 20, "verify": True, **changes}
    return push_weights(weights.items(), engine, version, **settings)


def test_the_engine_is_handed_the_parameter_itself(weights: dict[str, torch.Tensor]) -> None:
    handed = [item for bucket in weight_buckets(weights.items(), torch.bfloat16, 64) for item in bucket]
    assert [(name, tensor.data_ptr()) for name, tensor in handed] == [(n, t.data_ptr()) for n, t in weights.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_push_is_told_by_its_metrics(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    engine = Recorder(dtype)
    metrics = push(weights, engine, version=3)
    assert engine.weights_version == 3
    assert all(torch.equal(engine.values[name], tensor.to(dtype)) for name, tensor in weights.items())
    assert metrics["sync/version"] == 3
    assert metrics["sync/bytes"] == 48 * dtype.itemsize
    assert metrics["sync/unverified"] == 0
    parts = [metrics[f"sync/{part}_s"] for part in ("gather", "copy", "verify")]
    assert min(parts) >= 0
    assert metrics["sync/gib_per_s"] == pytest.approx(metrics["sync/bytes"] / 2**30 / sum(parts))


def test_stale_values_are_fatal(weights: dict[str, torch.Tensor]) -> None:
    engine = Recorder()
    push(weights, engine)
    engine.skips = {"norm.weight"}
    push(weights, engine, 2)  # the same values again: nothing is stale
    weights["norm.weight"] = weights["norm.weight"].clone()
    weights["norm.weight"][2] += 1e-6
    with pytest.raises(EngineError, match=r"version 3 .* values of norm.weight are not .* \(1 of 3 parameters\)"):
        push(weights, engine, 3)
    assert "sync/unverified" not in push(weights, engine, 4, verify=False)


def test_a_tied_head_must_equal_what_was_pushed(weights: dict[str, torch.Tensor]) -> None:
    engine = Recorder()
    engine.values["lm_head.weight"] = weights["embed.weight"].clone()
    push(weights, engine)
    weights["embed.weight"] = weights["embed.weight"] + 1
    with pytest.raises(EngineError, match=r"engine's lm_head\.weight equals nothing that was pushed"):
        push(weights, engine, 2)


def test_an_engine_in_another_type_is_noticed(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(EngineError, match="3 of 3 parameters"):
        push(weights, Recorder(torch.bfloat16), dtype=torch.float32)


def test_what_an_engine_cannot_tell_is_counted(weights: dict[str, torch.Tensor]) -> None:
    engine = Recorder()
    engine.untold = {"gate.weight"}
    assert push(weights, engine)["sync/unverified"] == 1
    engine.untold = set(weights)
    with pytest.raises(EngineError, match=r"set engine\.verify_weights=never"):
        push(weights, engine)


def test_an_engine_that_keeps_its_version_or_leaves_weights_unread_is_refused(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    monkeypatch.setattr(engine, "load_weights", lambda named, version: list(named))
    with pytest.raises(EngineError, match="reports weights version 0 after version 1"):
        push(weights, engine, verify=False)
    monkeypatch.setattr(engine, "load_weights", lambda named, version: next(iter(named)))
    with pytest.raises(EngineError, match="left 2 of the pushed parameters unread"):
        push(weights, engine, verify=False)


def test_the_engines_own_error_comes_through(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(EngineError, match=r"^broken engine$"):
        push(weights, Recorder(fails_after=1))
