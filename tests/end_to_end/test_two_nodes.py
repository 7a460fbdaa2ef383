"""A run over two nodes: an agent of torchrun for each, here on one machine, which meet at an address as nodes do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.test_ranks import ROOT, SPEAR, assert_same_run, config_file, run_here, training_lines


def test_two_nodes_make_the_run_of_one_process(tmp_path: Path) -> None:
    """Launched as docs/launch.md says; the first node has the main rank and prints, the second is silent."""
    alone = run_here(tmp_path, "name=alone", "steps=2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start_node(tmp_path, node, port, "name=nodes", "steps=2") for node in (0, 1)]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert_same_run(training_lines(tmp_path / "nodes"), alone)
    assert "step 2/2" in outputs[0] and "step 2/2" not in outputs[1]


def start_node(out: Path, node: int, port: int, *overrides: str) -> subprocess.Popen[str]:
    """Start the agent of a node with one rank."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    train = ["-m", "spear_fast.cli", "train", str(config_file(out)), f"out={out}", *SPEAR, *overrides]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, *launcher, *meeting, *train, "log.progress=plain"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        cwd=ROOT,
    )
