"""The calibration: what it measures is what a prediction can be made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import calibrate
from spear_fast.memory.gpus import load_gpu


def test_a_small_calibration_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which nothing is worth measuring; each rate is its amount divided by the middle of its times."""
    monkeypatch.setattr(calibrate, "MATRIX", {"cpu": 16})
    monkeypatch.setattr(calibrate, "COPIED_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(calibrate, "SEQUENCES", {"cpu": [8, 8]})
    monkeypatch.setattr(calibrate, "ROUNDS", 3)
    file = tmp_path / "coefficients.json"
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--device", "cpu", "--out", str(file)])
    calibrate.main()
    result = json.loads(file.read_text())
    assert result["machine"]["commit"] and result["dtype"] == "float32"
    gpu = load_gpu("cpu", file)
    assert gpu.matmul_flops.source == f"measured ({file})"
    assert gpu.matmul_flops.value == pytest.approx(2 * 16**3 / sorted(result["seconds"]["matmul_flops"])[1])
    assert gpu.memory_bandwidth.value == pytest.approx(2 * 2**16 / sorted(result["seconds"]["memory_bandwidth"])[1])
    assert gpu.train_flops.value > 0 and gpu.layer_s.value > 0 and gpu.memory_bytes > 0
    # Without links there is one rank, and nothing to move.
    assert gpu.link_bandwidth.value == 0
