"""Comparing result files: what is slower, larger or gone is told and fails, noise and news do not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compare

MACHINE = {"processor": "P", "cores": 2, "gpus": [], "commit": "abc"}


def result() -> dict[str, Any]:
    def rows(seconds: float) -> dict[str, Any]:
        measured = {"status": "measured", "median_s": seconds, "times_s": [seconds], "peak_extra_bytes": 100 << 20}
        return {"ours": measured, "theirs": {"status": "not installed", "reason": "No module named 'theirs'"}}

    cases = [{"title": f"N {n}", "num_rows": n, "contenders": rows(n / 1000)} for n in (128, 256)]
    return {"benchmark": "kernels", "machine": MACHINE, "settings": {"median_s": 1.0}, "cases": cases}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    def compared(change: Callable[[dict[str, Any]], object], *options: str) -> int:
        old, new = result(), copy.deepcopy(result())
        change(new)
        for name, content in (("old", old), ("new", new)):
            (tmp_path / name).write_text(json.dumps(content))
        return compare.main([str(tmp_path / "old"), str(tmp_path / "new"), *options])

    return compared


def ours(new: dict[str, Any], case: int = 1) -> dict[str, Any]:
    return new["cases"][case]["contenders"]["ours"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], int]] = {
    "nothing": (lambda new: None, 0),
    "noise": (lambda new: ours(new).update(median_s=0.256 * 1.09), 0),
    "faster": (lambda new: ours(new).update(median_s=0.01), 0),
    "slower": (lambda new: ours(new).update(median_s=0.256 * 1.11), 1),
    "larger": (lambda new: ours(new).update(peak_extra_bytes=111 << 20), 1),
    "no memory at all": (lambda new: ours(new).update(peak_extra_bytes=0), 0),
    "NaN": (lambda new: ours(new).update(median_s=float("nan")), 1),
    "refused": (lambda new: new["cases"][0]["contenders"].update(ours={"status": "refused", "reason": "wrong"}), 1),
    "a case gone": (lambda new: new["cases"].pop(), 1),
    "cases in another order": (lambda new: new["cases"].reverse(), 0),
    "one of two cases of one name": (
        lambda new: new["cases"].append({**new["cases"][1], "contenders": {"ours": {"median_s": 1}}}),
        1,
    ),
    "a new row": (lambda new: new["cases"][0]["contenders"].update(other={"status": "measured", "median_s": 9}), 0),
    "another setting": (lambda new: new["settings"].update(median_s=9.0), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_status_tells_what_got_worse(run: Callable[..., int], name: str) -> None:
    change, status = CHANGES[name]
    assert run(change) == status


def test_memory_counts_from_nothing_beyond_what_pages_make() -> None:
    def row(old: float, new: float) -> compare.Row:
        return compare.Row("", "peak_extra_bytes", old, new)

    assert not row(0, 1 << 20).is_worse(0.1) and row(0, 2 << 20).is_worse(0.1)
    assert row(0, 1).ratio == float("inf") and row(0, 0).ratio == 1
    assert not row(100, 500).is_worse(0.1)


def test_tolerance_and_place_narrow_it(run: Callable[..., int]) -> None:
    def slower(new: dict[str, Any]) -> None:
        ours(new).update(median_s=0.3)

    assert run(slower, "--tolerance", "0.2") == 0
    assert run(slower, "--only", "N 128") == 0
    assert run(slower, "--only", "N 256") == 1
    with pytest.raises(SystemExit):
        run(slower, "--tolerance", "-1")


def test_the_table_names_place_ratio_and_reason(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    run(CHANGES["refused"][0])
    out = " ".join(capsys.readouterr().out.split())
    assert "refused: wrong" in out and "2 worse" in out
    run(CHANGES["slower"][0])
    assert "1.11" in capsys.readouterr().out


def test_files_that_cannot_be_compared(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(lambda new: new.update(benchmark="step")) == 2
    assert "kernels and step" in capsys.readouterr().err
    assert run(lambda new: new.update(machine={**MACHINE, "gpus": [{"name": "G"}]})) == 2
    assert "--across-machines" in capsys.readouterr().err
    assert run(lambda new: new.update(machine={**MACHINE, "gpus": [{"name": "G"}]}), "--across-machines") == 0
    assert run(lambda new: new["settings"].update(size="tiny")) == 2
    assert "size: None and tiny" in capsys.readouterr().err
    assert run(lambda new: new.update(cases=[])) == 2
    (tmp_path / "broken").write_text("{")
    for path in ("broken", "absent"):
        assert compare.main([str(tmp_path / path), str(tmp_path / "old")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "list").write_text("[]")
    assert compare.main([str(tmp_path / "list"), str(tmp_path / "old")]) == 2
    assert "no result file" in capsys.readouterr().err


def test_every_committed_result_equals_itself() -> None:
    measured = [path for path in sorted(Path("bench/results").rglob("*.json")) if "median_s" in path.read_text()]
    assert measured and all(compare.main([str(path), str(path)]) == 0 for path in measured)
