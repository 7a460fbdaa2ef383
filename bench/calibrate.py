"""Measures the rates that `spear-fast plan --coefficients` divides by: products, memory, links, training, launches.

python bench/calibrate.py                                       # on a CPU: bench/results/cpu/coefficients.json
python bench/calibrate.py --gpu h200-141g                       # on a CUDA machine
torchrun --standalone --nproc-per-node 8 bench/calibrate.py     # with the links between GPUs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.machine import ROOT, describe_machine, result_folder
from bench.common.result_file import write_json
from spear_fast.batching import collate
from spear_fast.config.schema import ModelInit
from spear_fast.memory.gpus import DATASHEET
from spear_fast.memory.readings import device_bytes
from spear_fast.memory.shapes import shape_of_init
from spear_fast.types import MicroBatch, Row
from spear_fast.update.model import PackedModel, build_model

MATRIX = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MODELS = {
    "cpu": ModelInit(hidden_size=128, intermediate_size=480, vocab_size=512),
    "cuda": ModelInit(
        hidden_size=1536, num_heads=12, num_kv_heads=2, intermediate_size=8960, max_positions=4096, vocab_size=1024
    ),
}
"""Blocks of the quickstart, and four of Qwen2.5-1.5B; vocabularies are small, as the head is not measured here."""
SEQUENCES = {"cpu": [128] * 16, "cuda": [2048] * 8}
ROUNDS = 15


def main() -> None:
    """Measure on this machine and write the coefficients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", help="name in spear_fast/memory/gpus.json; default: guessed from the device's name")
    parser.add_argument("--out", type=Path, help="default: bench/results/<machine>/coefficients.json")
    args = parser.parse_args()
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", "0")) if args.device == "cuda" else 0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    times: dict[str, list[float]] = {}
    coefficients = measure(device, dtype, times)
    if int(os.environ.get("RANK", "0")) == 0:
        result = {
            "gpu": args.gpu or guessed_name(device),
            "memory_bytes": device_bytes(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "machine": describe_machine(),
            "coefficients": coefficients,
            "seconds": times,
        }
        folder = "cpu" if args.device == "cpu" else result_folder()
        out = args.out or ROOT / "bench/results" / folder / "coefficients.json"
        write_json(result, out)
        print(json.dumps({"gpu": result["gpu"], **coefficients}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(device: torch.device, dtype: torch.dtype, times: dict[str, list[float]]) -> dict[str, float]:
    """Return the coefficients by their names in `memory.gpus.Gpu`; put each one's times, in s, into `times`."""
    side, size = MATRIX[device.type], COPIED_BYTES[device.type]
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    product = left @ right
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "matmul_flops": (2.0 * side**3, lambda: torch.mm(left, right, out=product)),
        "memory_bandwidth": (2.0 * size, lambda: target.copy_(source)),
        "train_flops": training(device, dtype),
    }
    if device.type == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        work["host_bandwidth"] = (float(size), lambda: target.copy_(pinned, non_blocking=True))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        work["link_bandwidth"] = gathering(device, source)
    found = {}
    for name, (amount, run) in work.items():
        times[name] = timed(run, device)
        found[name] = amount / statistics.median(times[name])
    run, layers = one_token(device, dtype)
    times["layer_s"] = timed(run, device)
    return found | {"layer_s": statistics.median(times["layer_s"]) / layers}


def timed(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of several runs after one that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def training(device: torch.device, dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
    """Operations of a packed forward and backward pass, by the formula that predictions use, and the pass."""
    init, lengths = MODELS[device.type], SEQUENCES[device.type]
    packed, batch = packed_model(init, device, dtype), packed_rows(lengths, device)
    shape = shape_of_init(init)
    matrices = sum(inputs * outputs for inputs, outputs, _ in shape.linears.values())
    forward = sum(n * shape.num_layers * (2 * matrices + 2 * shape.query_width * n) for n in lengths)

    def run() -> None:
        packed.hidden_states(batch).float().square().mean().backward()

    return 3.0 * forward, run


def one_token(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A forward pass of one token, and the blocks it goes through."""
    init = MODELS[device.type]
    model = packed_model(init, device, dtype).model
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=False)

    return run, init.num_layers


def packed_model(init: ModelInit, device: torch.device, dtype: torch.dtype) -> PackedModel:
    """A random model on the device."""
    model = build_model(init, vocab_size=init.vocab_size, eos_id=0, seed=0, dtype=dtype)
    return PackedModel(model.to(device))  # type: ignore[arg-type]


def packed_rows(lengths: Sequence[int], device: torch.device) -> MicroBatch:
    """A micro-batch of rows of these lengths."""
    rows = []
    for uid, length in enumerate(lengths):
        zeros = np.zeros(length, dtype=np.float32)
        rows.append(Row(uid, uid, 0, np.full(length, uid, np.int32), np.arange(length) > 0, zeros, zeros))
    return collate(rows, range(len(rows)), device)


def gathering(device: torch.device, source: torch.Tensor) -> tuple[float, Callable[[], object]]:
    """Bytes that an all-gather brings to each rank, and the all-gather."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    part = source[: len(source) // ranks].clone()
    whole = torch.empty(len(part) * ranks, dtype=part.dtype, device=device)
    return float(len(part) * (ranks - 1)), lambda: dist.all_gather_into_tensor(whole, part)


def guessed_name(device: torch.device) -> str:
    """The GPU of gpus.json whose name begins like a word of the device's, else a name made of the device's."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    known = json.loads(DATASHEET.read_text(encoding="utf-8"))
    return next((key for key in known if key.split("-")[0] in name.split()), result_folder())


if __name__ == "__main__":
    main()
