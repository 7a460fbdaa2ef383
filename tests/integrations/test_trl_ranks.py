"""SPEARTrainer on two ranks (gloo, DDP) is the run of one process: losses, draws, replay and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.trl_two_ranks import train

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/integrations/trl_two_ranks.py"), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = torch.load(tmp_path / "runs.pt", weights_only=False)
    for mode, two in runs.items():
        one = train(mode, tmp_path, 1)
        logs = [
            [{k: v for k, v in entry.items() if k.startswith("spear/")} for entry in run["log"]] for run in (one, two)
        ]
        assert any(entry.get("spear/sil/selected_fraction", 0) > 0 for entry in logs[0]), mode
        for alone, shared in zip(*logs, strict=True):
            assert shared == pytest.approx(alone, rel=2e-3, abs=2e-4), mode
        for name, weight in one["weights"].items():
            # Adam turns roundings of gradients near 0 into steps of some size.
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-2, atol=2e-3)
