"""Programs per second and latencies of the code sandboxes: fresh and warm workers, other back ends, no sandbox at all.

python bench/sandbox.py --out bench/results/cpu/sandbox.json
python bench/sandbox.py --calls 10 --workers 1 2                    # does it run?
python bench/sandbox.py --url http://host:8080                      # with a SandboxFusion server
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import cases
from bench.common.machine import describe_machine
from spear_fast.envs.sandbox.base import Sandbox
from spear_fast.envs.sandbox.choose import SandboxParams, make_sandbox
from spear_fast.envs.sandbox.jail import Interpreter, Jail, Limits, free_uids
from spear_fast.envs.sandbox.seccomp import filter_descriptor
from spear_fast.envs.sandbox.worker import Program, Worker

TIMEOUT_S = 60.0
FEWER = 20
"""Divides the calls where each starts a process of its own."""
LIMITS = Limits(memory_mb=1024, max_output_chars=65_536, max_processes=32, disk_mb=64)
PEERS = ("python, no sandbox", "monty", "sandbox_fusion")
Call = Callable[[str], Awaitable[str]]
"""Runs a program and returns its stdout."""


@dataclass(frozen=True)
class Load:
    """A program and what it must print."""

    name: str
    code: str
    output: str


LOADS = (
    Load("sum", "print(sum(i * i for i in range(1000)))", "332833500\n"),
    Load(
        "sympy", "import sympy\nprint(sympy.factorint(2**31 - 2))", "{2: 1, 3: 2, 7: 1, 11: 1, 31: 1, 151: 1, 331: 1}\n"
    ),
)

COLUMNS: list[cases.Column] = [
    ("programs/s", cases.number("calls_per_s", ".0f")),
    ("median ms", cases.number("median_s", ".1f", 1e3)),
    ("p90 ms", cases.number("p90_s", ".1f", 1e3)),
    ("p99 ms", cases.number("p99_s", ".1f", 1e3)),
]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write the result; 1 if a row of ours failed, else 0."""
    args = _parser().parse_args(arguments)
    result = {
        "benchmark": "sandbox",
        "machine": describe_machine(["sympy", "pydantic-monty"]) | {"bubblewrap": _bubblewrap_version()},
        "settings": {"calls": args.calls, "workers": args.workers, "fusion": bool(args.url)},
        "cases": [as_case(load, args.calls, args.workers, args.url) for load in LOADS if load.name in args.loads],
    }
    cases.show(result, COLUMNS)
    cases.write(result, args.out)
    return int(cases.wrong(result, _peer_rows(result)))


def markdown(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    return cases.markdown_tables(result, COLUMNS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=cases.positive, default=400, help="of each row; without warm workers fewer")
    parser.add_argument("--workers", type=cases.positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--loads", nargs="+", choices=[load.name for load in LOADS], default=[x.name for x in LOADS])
    parser.add_argument("--url", help="of a SandboxFusion server")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def as_case(load: Load, calls: int, workers: list[int], url: str | None) -> dict[str, Any]:
    """All rows of one program: every back end at every number of workers."""
    rows: dict[str, cases.Row] = {}
    for count in workers:
        fewer = max(2, count, calls // FEWER)
        rows[f"python, no sandbox, {count}"] = measured(load, fewer, count, partial(Unsandboxed, count))
        rows[f"bubblewrap, one shot, {count}"] = measured(load, fewer, count, partial(OneShot, count))
        for name, params in pools(count, url).items():
            rows[f"{name}, {count}"] = measured(load, calls, count, partial(Pool, params))
    title = f"{load.name}: `{load.code.splitlines()[-1]}`; the number is that of programs at once"
    return {"name": title, "rows": rows}


def pools(count: int, url: str | None) -> dict[str, dict[str, Any]]:
    """The sandboxes that tasks can use, by the name of their rows."""
    found: dict[str, dict[str, Any]] = {
        "bubblewrap, warm": {"kind": "bubblewrap", "workers": count},
        "monty": {"kind": "monty", "workers": count},
    }
    if url:
        found["sandbox_fusion"] = {"kind": "sandbox_fusion", "workers": count, "url": url}
    return found


def measured(load: Load, calls: int, count: int, make: Callable[[], Any]) -> cases.Row:
    """The row of one back end; a wrong output gets no speed."""
    try:
        with closing(make()) as backend:
            wrong = asyncio.run(_warmed_up(load, backend.call, count))
            if wrong is not None:
                return cases.refused(cases.shortened(f"printed {wrong!r}"))
            times, wall_s = asyncio.run(_timed(load, backend.call, calls, count))
    except Exception as error:  # the others go on; the row says so
        return cases.unmeasured(error)
    hundredths = statistics.quantiles(times, n=100, method="inclusive")
    return cases.measured(times, calls_per_s=calls / wall_s, p90_s=hundredths[89], p99_s=hundredths[98])


async def _warmed_up(load: Load, call: Call, count: int) -> str | None:
    """Start every worker; return the first wrong output, if there is one."""
    outputs = await asyncio.gather(*(call(load.code) for _ in range(count)))
    return next((output for output in outputs if output != load.output), None)


async def _timed(load: Load, call: Call, calls: int, count: int) -> tuple[list[float], float]:
    """Seconds of each call and of all, with `count` of them under way at any time."""
    times: list[float] = []
    left = iter(range(calls))

    async def client() -> None:
        for _ in left:
            began = time.perf_counter()
            output = await call(load.code)
            times.append(time.perf_counter() - began)
            if output != load.output:
                raise ValueError(f"printed {output!r}")

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    return times, time.perf_counter() - began


class Pool:
    """One of the sandboxes as tasks use it."""

    def __init__(self, params: dict[str, Any]) -> None:
        self._sandbox: Sandbox = make_sandbox(SandboxParams(**params))

    async def call(self, code: str) -> str:
        result = await self._sandbox.run(code, timeout_s=TIMEOUT_S)
        return result.stdout or result.stderr or result.message

    def close(self) -> None:
        self._sandbox.close()


class Blocking(ABC):
    """Calls that block, `count` of them at once."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)

    async def call(self, code: str) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, code)

    def close(self) -> None:
        self._threads.shutdown()

    @abstractmethod
    def _run(self, code: str) -> str: ...


class OneShot(Blocking):
    """A fresh worker for every program, with nothing imported."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._jail = Jail(Interpreter.own(), LIMITS, [], free_uids(count))
        self._slots = list(range(count))

    def _run(self, code: str) -> str:
        slot = self._slots.pop()
        with filter_descriptor() as descriptor:
            worker = Worker(self._jail.command(slot, descriptor), descriptor, slot, LIMITS.output_bytes)
        try:
            worker.wait_ready()
            return worker.run(Program(code.encode(), b"", {}, TIMEOUT_S)).stdout.decode()
        finally:
            worker.close()
            self._slots.append(slot)


class Unsandboxed(Blocking):
    """The floor of a fresh process: the interpreter alone."""

    def _run(self, code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def _peer_rows(result: dict[str, Any]) -> set[str]:
    return {name for case in result["cases"] for name in case["rows"] if name.startswith(PEERS)}


def _bubblewrap_version() -> str | None:
    try:
        said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    return said.strip().rpartition(" ")[2]


if __name__ == "__main__":
    sys.exit(main())
