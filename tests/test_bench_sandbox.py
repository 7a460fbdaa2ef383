"""The benchmark of the sandboxes: every back end prints the right thing, and one that does not gets no speed."""

from __future__ import annotations

import json

from bench import sandbox
from bench.common import cases
from bench.sandbox import LOADS, Load, OneShot, Pool


def test_all_back_ends_are_measured(tmp_path):
    out = tmp_path / "sandbox.json"
    assert sandbox.main(["--calls", "6", "--workers", "1", "2", "--loads", "sum", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    cases.check_result(result)
    rows = result["cases"][0]["rows"]
    kinds = ("python, no sandbox", "bubblewrap, one shot", "bubblewrap, warm", "monty")
    assert set(rows) == {f"{kind}, {count}" for kind in kinds for count in (1, 2)}
    assert {row["status"] for row in rows.values()} == {"measured"}
    assert len(rows["bubblewrap, warm, 2"]["times_s"]) == 6
    assert rows["bubblewrap, warm, 1"]["p99_s"] >= rows["bubblewrap, warm, 1"]["median_s"] > 0
    assert "| bubblewrap, warm, 1 |" in sandbox.markdown(result)
    assert result["machine"]["bubblewrap"]


def test_a_wrong_output_gets_no_speed(monkeypatch):
    row = sandbox.measured(Load("x", "print(1)", "2\n"), 4, 1, lambda: OneShot(1))
    assert row == {"status": "refused", "reason": "printed '1\\n'"}
    monty = sandbox.measured(LOADS[1], 4, 1, lambda: Pool({"kind": "monty", "workers": 1}))
    assert monty["status"] == "refused" and "ModuleNotFoundError" in monty["reason"]
    absent = sandbox.measured(LOADS[0], 4, 1, lambda: Pool({"kind": "sandbox_fusion"}))
    assert absent["status"] == "failed"
    monkeypatch.setattr(sandbox, "LOADS", (Load("sum", "print(1)", "2\n"),))
    assert sandbox.main(["--calls", "2", "--workers", "1", "--loads", "sum"]) == 1
