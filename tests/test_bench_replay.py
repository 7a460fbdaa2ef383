"""The benchmark of the replay storage: all storages do the same work, and what is wrong gets no speed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import replay
from bench.common import cases
from bench.storages.load import Load, Steps
from bench.storages.storages import BASELINE, Ours, Savable, storages
from spear_fast.errors import MissingDependencyError

LOAD = Load(trajectories=320, steps=5, group=16, seed=3)
DRAW = 40


@pytest.mark.parametrize("name", storages(0, 0, 0))
def test_storages_keep_find_and_draw_the_same(name, tmp_path):
    storage, steps = storages(DRAW, 3, LOAD.longest)[name](), Steps(LOAD)
    stored: list[tuple[int, float]] = []
    means: list[float] = []
    for version in range(7):
        step = steps.make(version)
        storage.push(storage.prepare(step))
        stored += [(version, row.reward) for row in step.rows]
        means += [float(np.mean([one.reward for one in group.trajectories])) for group in step.groups]
        stored = [one for one in stored if version - one[0] <= 3]
        baseline = float(np.median(means[-BASELINE:]))
        eligible = sum(reward > baseline for _, reward in stored)
        assert storage.scan(version) == (len(stored), eligible) and 0 < eligible < len(stored)
    snapshot = storage.snapshot()
    for seed in range(2):
        storage.restore(snapshot)
        assert storage.draw(6, seed) == DRAW
    if isinstance(storage, Savable):
        storage.restore(snapshot)
        storage.save(tmp_path / "replay.npz")
        storage.load(tmp_path / "replay.npz")
        assert storage.draw(6, 0) == DRAW
    assert isinstance(storage, Savable) == (name != "list of dicts")


def test_steps_are_the_same_for_all_and_their_bytes_are_those_of_their_rows():
    first, again, other = Steps(LOAD).make(2), Steps(LOAD).make(2), Steps(LOAD).make(3)
    for row, same in zip(first.rows, again.rows, strict=True):
        assert (row.uid, row.reward) == (same.uid, same.reward)
        np.testing.assert_array_equal(row.tokens, same.tokens)
        assert row.advantages[row.action_mask].min() == 1 and not row.advantages[~row.action_mask].any()
    assert {row.uid for row in first.rows}.isdisjoint(row.uid for row in other.rows)
    arrays = [(row.tokens, row.action_mask, row.old_logp, row.advantages) for row in first.rows]
    expected = sum(array.nbytes for row in arrays for array in row) + 48 * len(first.rows)
    assert Steps(LOAD).payload_bytes(2) == expected


def test_the_whole_benchmark_and_a_storage_that_loses_rows(tmp_path, monkeypatch):
    def here(name, load, draw, repeats):
        return replay.payload_copy(load) if name == "payload copy" else replay.measure(name, load, draw, repeats)

    def measured(name, load, draw, repeats):
        try:
            return here(name, load, draw, repeats)
        except Exception as error:
            return {"push": cases.unmeasured(error)}

    monkeypatch.setattr(replay, "measured_apart", measured)
    arguments = ["--trajectories", "320", "--steps", "5", "--draw", "40", "--repeats", "2"]
    out = ["--out", str(tmp_path / "replay.json")]
    assert replay.main([*arguments, *out]) == 0
    result = json.loads((tmp_path / "replay.json").read_text())
    push = result["cases"][0]["rows"]
    assert list(push) == ["payload copy", *storages(0, 0, 0)]
    assert push["ours"]["payload_bytes"] == sum(Steps(Load(320, 5)).payload_bytes(index) for index in range(5))
    assert len(push["ours"]["times_s"]) == 5
    assert "| ours |" in replay.markdown(result)

    offer = Ours.push
    monkeypatch.setattr(Ours, "push", lambda self, step: offer(self, step) if step.rows[0].version else None)
    assert replay.main([*arguments, *out, "--only", "ours"]) == 1
    case = json.loads((tmp_path / "replay.json").read_text())["cases"][0]
    assert case["rows"]["ours"]["status"] == "failed" and "holds" in case["rows"]["ours"]["reason"]


def test_rows_that_were_not_measured_say_why():
    missing = cases.unmeasured(MissingDependencyError("vllm", "vllm", "engine.name=vllm"))
    assert missing["status"] == "not installed" and "vllm" in missing["reason"]
    assert cases.unmeasured(RuntimeError("no"))["status"] == "failed"
    row = cases.measured([2.0, 1.0, 4.0])
    assert (row["median_s"], row["spread"]) == (2.0, 3.0)
    result = {
        "benchmark": "x",
        "machine": {},
        "settings": {},
        "cases": [{"name": "c", "rows": {"a": row, "b": missing}}],
    }
    cases.check_result(result)
    text = cases.markdown_tables(
        result, [("s", cases.number("median_s", ".1f")), ("GB/s", cases.number("rate", ".1f"))]
    )
    *table, _, reason = text.splitlines()[2:]
    assert table == ["| | s |", "|---|---|", "| a | 2.0 |", "| b | not installed |"]
    assert reason == f"No figure: b (not installed: `{missing['reason']}`)."
    for broken in ({"status": "fine"}, {"status": "measured"}, {"status": "failed"}):
        with pytest.raises(ValueError, match="row 'a'"):
            cases.check_result({**result, "cases": [{"name": "c", "rows": {"a": broken}}]})
    with pytest.raises(ValueError, match="settings"):
        cases.check_result({"benchmark": "x", "machine": {}, "cases": []})


def test_only_rows_of_peers_may_fail():
    def result(**rows):
        return {"cases": [{"name": "c", "rows": {name: {"status": status} for name, status in rows.items()}}]}

    assert not cases.wrong(result(ours="measured", theirs="failed", absent="not installed"), ("theirs",))
    assert cases.wrong(result(ours="failed", theirs="measured"), ("theirs",))
    assert cases.wrong(result(floor="refused", theirs="measured"), ("theirs",))
