"""What SPEARTrainer adds to a checkpoint: inside a round the memory before its draw; damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spear_fast.errors import CheckpointError
from spear_fast.integrations.trl.state import FILE, load_state, save_state
from tests.integrations.trl_toys import RUN, history, spear


def test_a_round_that_is_made_again_draws_the_same_rows(tmp_path: Path) -> None:
    options = {**RUN, "replay_mode": "joint", "steps_per_generation": 4, "max_steps": 6}
    trainer = spear(tmp_path, **options, save_strategy="steps", save_steps=1)
    trainer.train()
    drawn = history(trainer, "spear/replay/drawn")
    # Two optimizer steps make a round, whose draw the first of them logs.
    rounds = [index for index, count in enumerate(drawn) if count > 0]
    assert len(drawn) == 3 and rounds
    again = spear(tmp_path, **options)._imitation
    assert again is not None
    for index in rounds:
        for step, expected in ((2 * index + 1, drawn[index]), (2 * index + 2, 0)):
            finished = load_state(tmp_path / f"checkpoint-{step}", again.memory)
            assert finished == step // 2
            stats = again.begin_round(index)
            assert stats["replay/drawn"] == expected
    assert trainer._imitation is not None and trainer._imitation._before_draw is None


def whole(path: Path) -> bytes:
    save_state(path, 3, {})
    return (path / FILE).read_bytes()


def as_file(folder: Path, **arrays: np.ndarray) -> bytes:
    np.savez(folder / "other.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return (folder / "other.npz").read_bytes()


DAMAGED = {
    "empty": lambda folder: b"",
    "text": lambda folder: b"not an archive",
    "cut": lambda folder: whole(folder)[:100],
    "changed": lambda folder: whole(folder).replace(np.int64(3).tobytes(), np.int64(4).tobytes(), 1),
    "foreign": lambda folder: as_file(folder, step=np.array(1)),
    "several rounds": lambda folder: as_file(folder, finished_rounds=np.arange(3)),
    "pickled": lambda folder: as_file(folder, finished_rounds=np.array([{}], dtype=object)),
    "one array": lambda folder: (np.save(folder / "a.npy", np.arange(3)), (folder / "a.npy").read_bytes())[1],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_state_is_refused(name: str, tmp_path: Path) -> None:
    content = DAMAGED[name](tmp_path)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spear_state\.npz is damaged or not of SPEARTrainer"):
        load_state(tmp_path, None)


def test_a_whole_state_is_read(tmp_path: Path) -> None:
    save_state(tmp_path, 3, {})
    assert load_state(tmp_path, None) == 3
