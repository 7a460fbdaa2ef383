"""metrics.jsonl and TensorBoard events: nothing lost by a kill, nothing repeated by a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.errors import MissingDependencyError, SpearError
from spear_fast.log import sinks as sinks_module
from spear_fast.log.records import read_records
from spear_fast.log.sinks import JsonlSink, TensorBoardSink, open_sinks


def write_steps(path: Path, steps: range, first_step: int = 0) -> None:
    sink = JsonlSink(path, first_step)
    for step in steps:
        sink.write(step, {"reward/mean": step / 8})
    sink.close()


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_every_line_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"reward/mean": 0.25})
    assert read_records(path) == [{"step": 1, "reward/mean": 0.25}]
    sink.close()


def test_numbers_survive_and_not_finite_ones_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"a": 0.1 + 0.2, "b": float("nan"), "c": float("inf")})
    sink.close()
    assert read_records(path) == [{"step": 1, "a": 0.1 + 0.2, "b": None, "c": None}]


@given(written=st.integers(0, 8), resumed=st.integers(0, 9), torn=st.binary(max_size=12))
def test_a_resumed_file_equals_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, written: int, resumed: int, torn: bytes
) -> None:
    """Whatever was written after the checkpoint, half a line included, is replaced."""
    folder = tmp_path_factory.mktemp("run")
    first = min(resumed, written)
    write_steps(folder / "unbroken", range(12))
    write_steps(folder / "broken", range(written))
    with (folder / "broken").open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    write_steps(folder / "broken", range(first, 12), first_step=first)
    assert (folder / "broken").read_bytes() == (folder / "unbroken").read_bytes()


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(5))
    write_steps(path, range(2))
    assert steps_in(path) == [0, 1]


@pytest.mark.parametrize("line", ["{]", "[1]", '{"reward/mean": 1}', '{"step": true}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(SpearError, match=r"metrics\.jsonl, line 2"):
        read_records(path)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_a_resumed_step_once(tmp_path: Path) -> None:
    for first_step, value in ((1, 0.25), (3, 0.5)):
        sink = TensorBoardSink(tmp_path, first_step)
        for step in range(first_step, 5):
            sink.write(step, {"reward/mean": value, "update/loss": float("nan")})
        sink.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5)]


def test_open_sinks_writes_to_both(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path, tensorboard=True)
    for sink in sinks:
        sink.write(1, {"reward/mean": 0.5})
        sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward/mean": 0.5}
    assert scalars(tmp_path / "tensorboard", "reward/mean") == [(1, 0.5)]


def test_without_tensorboard_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks_module, "tensorboard_installed", lambda: False)
    with caplog.at_level(logging.WARNING):
        sinks = open_sinks(tmp_path, tensorboard=True)
    assert [type(sink) for sink in sinks] == [JsonlSink]
    assert len(caplog.records) == 1
    assert "spear-fast[track]" in caplog.text
    with pytest.raises(MissingDependencyError, match="track"):
        TensorBoardSink(tmp_path)


def test_tensorboard_not_asked_for_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [type(sink) for sink in open_sinks(tmp_path, tensorboard=False)] == [JsonlSink]
    assert not caplog.records
    assert not (tmp_path / "tensorboard").exists()
