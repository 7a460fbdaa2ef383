"""The benchmark of many trajectories with slow, failing and hanging tools: its plan, its gate, and that it runs."""

from __future__ import annotations

import json

import pytest

from bench import agents
from bench.common import cases
from bench.engines.agent_load import Call, Load, hanging, longest_trajectory, slowest_of_each_turn

LOAD = Load(40, 3, median_s=0.005, sigma=1.0, fail=0.2, hang=0.1, timeout_s=0.2)
PLAN = [[Call("return", 1.0), Call("fail", 5.0)], [Call("return", 4.0), Call("hang", 3.0)], [Call("return", 2.0)]]


def test_a_plan_follows_from_its_seed_and_has_all_that_can_happen():
    plan = LOAD.plan(0)
    assert plan == LOAD.plan(0) != LOAD.plan(1)
    assert {call.end for calls in plan for call in calls} == {"return", "fail", "hang"}
    for calls in plan:
        assert all(call.end != "hang" for call in calls[:-1])
        assert len(calls) == 3 or calls[-1].end == "hang"
        assert all(call.seconds < 0.2 for call in calls if call.end != "hang")


def test_bounds_are_those_of_the_plan():
    assert longest_trajectory(PLAN) == 7.0
    assert slowest_of_each_turn(PLAN) == 4.0 + 5.0
    assert hanging(PLAN) == [1]
    plan = LOAD.plan(0)
    assert longest_trajectory(plan) <= slowest_of_each_turn(plan)


@pytest.mark.parametrize(
    ("outcomes", "accepted"),
    [
        ([True, None, True], True),
        ([True, None], False),
        ([True, True, True], False),
        ([None, None, True], False),
        ([True, None, "env_error"], False),
        ([False, None, True], False),
    ],
)
def test_only_the_planned_ends_are_accepted(outcomes, accepted):
    assert (agents.complaint(PLAN, outcomes) is None) == accepted


def test_outcomes_that_are_not_planned_get_no_time():
    row = agents.row(lambda *_: [True] * len(PLAN), PLAN, LOAD, 1)
    assert row["status"] == "refused" and "median_s" not in row
    assert agents.row(lambda *_: 1 / 0, PLAN, LOAD, 1)["status"] == "failed"  # type: ignore[arg-type, return-value]


def test_it_runs_and_writes_a_result(tmp_path, capsys):
    file = tmp_path / "agents.json"
    small = "--trajectories 24 --turns 2 --median-s 0.005 --fail 0.2 --hang 0.1 --timeout-s 0.2 --repeats 1"
    assert agents.main([*small.split(), "--out", str(file)]) == 0
    result = json.loads(file.read_text())
    cases.check_result(result)
    assert result["settings"]["calls"].keys() == {"return", "fail", "hang"}
    (case,) = result["cases"]
    assert {name: row["status"] for name, row in case["rows"].items()} == {
        "collector": "measured",
        "lock step": "measured",
    }
    for row in case["rows"].values():
        assert row["won"] + row["timed_out"] == 24 and row["timed_out"] > 0
        assert row["median_s"] >= result["settings"]["longest_trajectory_s"] / 2
    assert "lock step" in agents.markdown(result)
    assert "longest trajectory" in capsys.readouterr().out
