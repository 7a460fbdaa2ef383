"""vLLM beside other processes: its process that cannot start or is left alone, and ranks with one engine each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spear_fast.errors import ConfigError, EngineError
from spear_fast.rollout.vllm_bucket import Bucket, open_bucket, view
from spear_fast.rollout.vllm_compat import CoreSettings
from spear_fast.rollout.vllm_process import CoreProcess
from tests.rollout.test_vllm_engine import generate, greedy, make_model, prompt_of, push, request, start

ROOT = Path(__file__).resolve().parents[2]


def process_ends(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_cannot_start_says_why(tmp_path):
    settings = CoreSettings(str(tmp_path), "float32", 64, 4, 61, None, 64)
    with pytest.raises(EngineError, match="did not start within"):
        CoreProcess(settings, bucket_bytes=1000, startup_timeout_s=0.05)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        CoreProcess(settings, bucket_bytes=1000)


def test_no_engine_outlives_a_trainer_that_is_killed(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import multiprocessing, threading, time\n"
        "from spear_fast.rollout.vllm_process import CoreProcess, CoreSettings\n"
        "if __name__ == '__main__':\n"
        "    settings = CoreSettings('nowhere', 'float32', 64, 4, 61, None, 64)\n"
        "    threading.Thread(target=CoreProcess, args=(settings,), kwargs={'bucket_bytes': 1}, daemon=True).start()\n"
        "    while not multiprocessing.active_children():\n"
        "        time.sleep(0.01)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        try:
            assert trainer.stdout is not None
            pid = int(trainer.stdout.readline())
        finally:
            trainer.kill()
    assert process_ends(pid)


def rank_with_an_engine(rank: int, folder: str) -> None:
    """Two ranks; each has an engine of its own in its process, started and used at different times."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    if rank == 1:
        dist.barrier()  # no collective of the engine may be needed: the other rank starts its own first
    engine = start(f"{folder}/{rank}", make_model())
    if rank == 0:
        dist.barrier()
    assert dist.group.WORLD is group and os.environ["RANK"] == str(rank)
    model = push(engine, make_model(rank))
    prompt = prompt_of(rank)
    (completion,) = generate(engine, [request(rank, prompt, temperature=0.0)])
    assert completion.tokens == greedy(model, prompt, 12)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == 3
    fresh = dist.new_group(backend="gloo")
    engine.close()
    dist.all_reduce(total, group=fresh)
    assert total.item() == 6 and dist.group.WORLD is group
    dist.destroy_process_group()
    Path(folder, f"rank-{rank}-done").touch()


def test_each_of_two_ranks_has_its_own_engine(tmp_path):
    torch.multiprocessing.spawn(rank_with_an_engine, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("rank-*-done")} == {"rank-0-done", "rank-1-done"}


def test_a_bucket_carries_tensors_of_every_type_and_says_when_it_is_full():
    bucket = Bucket(1000, torch.device("cpu"))
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 3, dtype=torch.bfloat16),
        "strided": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
    }
    assert all(bucket.add(name, tensor) for name, tensor in tensors.items())
    assert not bucket.add("more", torch.zeros(200))
    buffer = open_bucket(bucket.handle())
    for entry in bucket.take():
        assert torch.equal(view(buffer, entry), tensors[entry.name])
    assert bucket.take() == [] and bucket.add("more", torch.zeros(200))
