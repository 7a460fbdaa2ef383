"""The random state: what is drawn after a restore is what was drawn after the capture."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from spear_fast.checkpoint import capture_rng, load_latest, restore_rng, save
from spear_fast.errors import CheckpointError


def draw() -> list[float]:
    # An odd number of normals leaves one cached inside python's and numpy's generators.
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(()).item()]


@pytest.fixture(autouse=True)
def keep_global_state():
    state = capture_rng()
    yield
    restore_rng(state)


def test_draws_repeat_after_a_trip_to_the_disk(tmp_path):
    draw()
    save(tmp_path, 1, tensors={"rng": capture_rng()})
    expected = [draw(), draw()]
    restore_rng(load_latest(tmp_path).tensors("rng"))
    assert [draw(), draw()] == expected


def test_capture_draws_nothing():
    state = capture_rng()
    first = draw()
    restore_rng(state)
    capture_rng()
    assert draw() == first


def test_damaged_state_is_named():
    state = capture_rng()
    for name in ("python", "numpy", "torch"):
        with pytest.raises(CheckpointError, match="random state"):
            restore_rng({key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match="random state"):
        restore_rng({**state, "torch": torch.zeros(3, dtype=torch.uint8)})
