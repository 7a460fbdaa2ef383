"""The measurement of engine and trainer on one GPU: what it refuses to report, and what it makes of its cycles."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from bench import colocated

GIB = 1 << 30
EXTRA: dict[str, Any] = {"mode": "sleep2", "kv_cache_bytes": 10 * GIB}


def cycle(**changes: Any) -> dict[str, Any]:
    base = {
        "seconds": {"rollout": 2.0},
        "rollout_tokens_per_s": 100.0,
        "old_logp_tokens_per_s": 10.0,
        "update_tokens_per_s": 5.0,
        "skipped_steps": 0.0,
        "sync": {"sync/gib_per_s": 8.0},
        "peak_gib": {"rollout": 30.0},
        "gap": {"mean_nats": 0.01, "max_nats": 0.1},
        "memory": {"awake_bytes": 40 * GIB, "asleep_bytes": 27 * GIB, "weight_bytes": 3 * GIB},
    }
    for name, value in changes.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) else value
    return copy.deepcopy(base)


@pytest.mark.parametrize(
    ("change", "extra", "word"),
    [
        ({"gap": {"mean_nats": 0.2}}, {}, "gap"),
        ({"gap": {"mean_nats": float("nan")}}, {}, "gap"),
        ({"skipped_steps": 1.0}, {}, "skipped"),
        ({"memory": {"awake_bytes": 39 * GIB}}, {}, "freed"),
        ({"memory": {"awake_bytes": 41 * GIB, "asleep_bytes": 27 * GIB + (65 << 20)}}, {}, "more in use"),
        ({}, {"restart": {"closed_bytes": 28 * GIB, "mean_nats": 0.0}}, "closed engine"),
        ({}, {"restart": {"closed_bytes": 0, "mean_nats": 0.3}}, "gap"),
    ],
)
def test_what_is_wrong_is_named(change, extra, word):
    good = [cycle(), cycle()]
    assert colocated.complaints([*good, cycle()], EXTRA, "cuda") == []
    found = colocated.complaints([*good, cycle(**change)], EXTRA | extra, "cuda")
    assert len(found) == 1 and word in found[0]


def test_the_first_cycle_and_verified_syncs_are_not_timed():
    verified = {"sync/gib_per_s": 1.0, "sync/unverified": 0.0}
    cycles = [
        cycle(sync=verified, seconds={"rollout": 99.0}, rollout_tokens_per_s=1.0, gap={"max_nats": 0.7}),
        cycle(seconds={"rollout": 2.0}),
        cycle(seconds={"rollout": 4.0}),
        cycle(sync=verified, seconds={"rollout": 3.0}),
    ]
    summary = colocated.summary(cycles)
    assert summary["cycles"] == 3 and summary["rollout_tokens_per_s"] == 100.0
    assert summary["seconds"]["rollout"] == 3.0 and summary["sync_gib_per_s"] == 8.0
    # Correctness is that of all cycles.
    assert summary["gap_max_nats"] == 0.7


def test_no_speed_is_written_where_something_is_wrong(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    arguments = ["--load", "tiny", "--mode", "resident", "--device", "cpu", "--out", str(file)]
    for gap, status in ((0.01, 0), (0.5, 1)):
        monkeypatch.setattr(colocated, "run_cycles", lambda *_, gap=gap: ([cycle(gap={"mean_nats": gap})], EXTRA))
        assert colocated.main(arguments) == status
        result = json.loads(file.read_text())
        assert ("summary" in result) == ("cycles" in result) == (status == 0)
        assert result["memory"][0]["mean_nats"] == gap and result["machine"]["commit"]
