"""Peak memory of one step: allocated bytes on CUDA, resident bytes of a process of its own on the CPU."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.common.machine import ROOT
from bench.layers.contenders import Contender, Step
from bench.layers.level import Case
from bench.layers.levels import LEVELS
from bench.layers.measure import clear_gradients, cuda_peak, prepare, resident_peak, run_step

PATIENCE_S = 300
"""How long a process may take for a compilation and two steps."""
# Freed blocks must go back to the system at once, or they would hide what is allocated after them.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 18),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])),
    # The folder of a script, bench/ say, must not come before these.
    "PYTHONSAFEPATH": "1",
    # Workers of its own would not be seen here, and end later than the process that wants them.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def peak_of(contender: Contender, step: Step, problem: Any, case: Case, seed: int) -> dict[str, Any]:
    """Peak bytes beyond the inputs, gradients included, as `peak_extra_bytes`; or `no_memory_figure` and why."""
    if problem.device.type == "cuda":
        return {"peak_extra_bytes": cuda_peak(step, problem, LEVELS[case.level].has_backward)}
    if contender.compiled and LEVELS[case.level].is_short:
        return {"no_memory_figure": "left out: the process would compile for seconds what runs for milliseconds"}
    context = multiprocessing.get_context("forkserver")
    with _environment(_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, contender.name, case, seed, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(PATIENCE_S) else {"no_memory_figure": f"no answer in {PATIENCE_S} s"}
    except EOFError:
        return {"no_memory_figure": "the process died"}
    finally:
        if process.is_alive():
            process.join(5)
        process.kill()
        process.join()


def preload() -> None:
    """Before the first `peak_of`: what contenders need is imported once, in the process that others are forked from."""
    multiprocessing.set_forkserver_preload(["bench.layers.preload"])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that a process started meanwhile has."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _answer(sender: Connection, name: str, case: Case, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        answer = {"peak_extra_bytes": resident_peak_of(name, case, seed)}
    except Exception as error:  # whatever it is, it is the answer
        answer = {"no_memory_figure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    sender.send(answer)


def resident_peak_of(name: str, case: Case, seed: int) -> int:
    """How far one step of the contender raises this process's resident memory, after a small step that warms up.

    Raises:
        OSError: the system does not let a process reset its own peak.
    """
    level, device = LEVELS[case.level], torch.device("cpu")
    (contender,) = (one for one in level.contenders if one.name == name)
    step = contender.build(device)
    run_step(step, level.gate_problem(case, device, seed), level.has_backward)
    problem = level.problem(case, device, seed)
    if contender.compiled:
        run_step(step, problem, level.has_backward)
        clear_gradients(problem)
    prepare(step, problem)
    return resident_peak(lambda: run_step(step, problem, level.has_backward))
