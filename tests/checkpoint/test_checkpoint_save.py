"""Save and load: content survives, and a process that dies anywhere leaves a loadable checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from spear_fast.checkpoint import layout, load_latest, save
from spear_fast.errors import CheckpointError

SYSTEM_CALLS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]


def write(run: Path, step: int, keep: int = 2, mark: int | None = None) -> Path:
    mark = step if mark is None else mark
    return save(
        run,
        step,
        tensors={"optimizer": {"moment": torch.full((3,), float(mark)), "num_steps": mark, "betas": (0.9, 0.99)}},
        arrays={"replay": {"tokens": np.arange(mark, mark + 4, dtype=np.int32)}},
        values={"trainer": {"mark": mark, "names": ["a"]}},
        folders={"model": lambda folder: (folder / "weights.bin").write_bytes(bytes([mark % 256]) * 100)},
        keep=keep,
    )


def mark_of(run: Path) -> int:
    """The mark of the checkpoint to resume from, after checking that all of its parts carry the same one."""
    checkpoint = load_latest(run)
    mark = checkpoint.values("trainer")["mark"]
    optimizer = checkpoint.tensors("optimizer")
    assert optimizer["num_steps"] == mark and torch.equal(optimizer["moment"], torch.full((3,), float(mark)))
    np.testing.assert_array_equal(checkpoint.arrays("replay")["tokens"], np.arange(mark, mark + 4))
    assert (checkpoint.folder("model") / "weights.bin").read_bytes() == bytes([mark % 256]) * 100
    return mark


def die_at(monkeypatch: pytest.MonkeyPatch, call: int, die) -> list[int]:
    """Let the `call`-th file-system call from now on run `die` instead; returns the counter of calls."""
    count = [0]

    def guard(real):
        def guarded(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                die()
            return real(*args, **kwargs)

        return guarded

    for module, name in SYSTEM_CALLS:
        monkeypatch.setattr(module, name, guard(getattr(module, name)))
    return count


def interrupt() -> None:
    raise KeyboardInterrupt


def count_calls(run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        count = die_at(patch, -1, lambda: None)
        write(run, step, keep=1, mark=99)
    return count[0]


def test_round_trip(tmp_path):
    path = write(tmp_path, 40)
    assert path == tmp_path / "checkpoints" / "step_000040"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000040\n"
    checkpoint = load_latest(str(tmp_path))
    assert (checkpoint.step, checkpoint.path) == (40, path)
    assert mark_of(tmp_path) == 40
    assert checkpoint.tensors("optimizer")["betas"] == (0.9, 0.99)
    assert checkpoint.arrays("replay")["tokens"].dtype == np.int32


def test_keeps_the_newest_and_removes_leftovers(tmp_path):
    leftover = tmp_path / "checkpoints" / (layout.TEMPORARY_PREFIX + "step_000009")
    leftover.mkdir(parents=True)
    for step in (10, 20, 30):
        write(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_000020", "step_000030"]


def test_never_deletes_the_checkpoint_pointed_to(tmp_path):
    for step in (30, 40, 10):
        write(tmp_path, step, keep=1)
    assert mark_of(tmp_path) == 10


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 10, mark=77)
    assert mark_of(tmp_path) == 77
    assert not (tmp_path / "checkpoints" / "step_000010.old").exists()


@pytest.mark.parametrize("step", [20, 10], ids=["next step", "same step again"])
def test_exception_at_any_call_leaves_old_or_new(tmp_path, monkeypatch, step):
    write(tmp_path / "probe", 10, keep=1)
    seen = set()
    for call in range(1, count_calls(tmp_path / "probe", step, monkeypatch) + 1):
        run = tmp_path / f"run{call}"
        write(run, 10, keep=1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            die_at(patch, call, interrupt)
            write(run, step, keep=1, mark=99)
        seen.add(mark_of(run))
        # While a save of the same step is replaced, the pointer may lead nowhere; the loader then takes the old twin.
        assert step == 10 or layout.is_complete(layout.pointed_to(run / "checkpoints"))
        write(run, 30, keep=1)
        assert mark_of(run) == 30
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000030"]
    assert seen == {10, 99}


@pytest.mark.parametrize("step", [20, 10], ids=["next step", "same step again"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_at_any_call_leaves_old_or_new(tmp_path, monkeypatch, step):
    write(tmp_path / "probe", 10, keep=1)
    for call in range(1, count_calls(tmp_path / "probe", step, monkeypatch) + 1):
        run = tmp_path / f"run{call}"
        write(run, 10, keep=1)
        child = os.fork()
        if child == 0:
            die_at(monkeypatch, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            write(run, step, keep=1, mark=99)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert mark_of(run) in (10, 99)


def test_failing_writer_keeps_the_previous_checkpoint(tmp_path):
    write(tmp_path, 10)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match=r"step_000020.*No space left.*free space"):
        save(tmp_path, 20, values={"trainer": {}}, folders={"model": fail})
    assert mark_of(tmp_path) == 10


def test_incomplete_and_foreign_folders_are_ignored(tmp_path):
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    shutil.copytree(path, path.with_name("step_000030"))
    (path.with_name("step_000030") / "trainer.json").write_text("{}")
    path.with_name("notes").mkdir()
    (path.parent / "latest").write_text("step_000030\n")
    assert mark_of(tmp_path) == 20
    (path / layout.MANIFEST).unlink()
    assert mark_of(tmp_path) == 10
    (path.parent / "latest").write_text("../../elsewhere\n")
    assert mark_of(tmp_path) == 10


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="found none; start the run without --resume"):
        load_latest(tmp_path)
    (write(tmp_path, 10) / layout.MANIFEST).write_text("not json")
    with pytest.raises(CheckpointError, match="only incomplete ones"):
        load_latest(tmp_path)


def test_missing_damaged_and_newer_parts(tmp_path):
    path = write(tmp_path, 10)
    checkpoint = load_latest(tmp_path)
    for read in (checkpoint.tensors, checkpoint.arrays, checkpoint.values, checkpoint.folder):
        with pytest.raises(CheckpointError, match="no part 'absent"):
            read("absent")
    for name, read in (("optimizer.pt", checkpoint.tensors), ("replay.npz", checkpoint.arrays)):
        size = (path / name).stat().st_size
        (path / name).write_bytes(b"x" * size)
        with pytest.raises(CheckpointError, match="damaged"):
            read(name.split(".")[0])
    (path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.values("trainer")
    (path / layout.MANIFEST).write_text('{"format": 1, "step": 10, "files": {}}')
    with pytest.raises(CheckpointError, match="format 1"):
        load_latest(tmp_path)


def test_pickles_are_refused(tmp_path):
    save(tmp_path, 1, tensors={"optimizer": {"path": Path("x")}})
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        load_latest(tmp_path).tensors("optimizer")
    with pytest.raises(CheckpointError, match=r"\['rows'\] of part 'replay' hold Python objects"):
        save(tmp_path, 2, arrays={"replay": {"rows": np.array([{}], dtype=object)}})
    assert load_latest(tmp_path).step == 1
