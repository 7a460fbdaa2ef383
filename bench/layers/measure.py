"""Time and memory of one step, on the CPU or on CUDA."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from bench.layers.contenders import Inputs, Outcome, Step

MAX_COPIES = 64
# Rounds before the timed ones; on the CPU the run that checks the result is the warm-up of steps that take long.
WARM_UP = {"cpu": 0, "cuda": 3}
SHORT_WARM_UP = 2


class Prepared:
    """A step of another project: what its trainer holds in a form of its own is made once per problem, untimed.

    `make` returns these inputs, which must not hold the problem itself; `step` is given the problem and them.
    """

    def __init__(self, make: Callable[[Any], Any], step: Callable[[Any, Any], Outcome]) -> None:
        self._make, self._step = make, step
        self._made: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def prepare(self, problem: Any) -> None:
        """Make the inputs, unless they are there."""
        if problem not in self._made:
            self._made[problem] = self._make(problem)

    def __call__(self, problem: Any) -> Outcome:
        """Run the step."""
        self.prepare(problem)
        return self._step(problem, self._made[problem])


def prepare(step: Step, problem: Inputs) -> None:
    """Make what a `Prepared` step needs, before a clock or a memory probe starts."""
    if isinstance(step, Prepared):
        step.prepare(problem)


def run_step(step: Step, problem: Inputs, backward: bool = True) -> Outcome:
    """Forward and, unless `backward` is False or there is no loss, backward into fresh gradients."""
    clear_gradients(problem)
    if not backward:
        with torch.no_grad():
            return step(problem)
    outcome = step(problem)
    if outcome.loss is not None:
        outcome.loss.backward()
    return outcome


def clear_gradients(problem: Inputs) -> None:
    """Drop the gradients of the last step."""
    for leaf in problem.leaves:
        leaf.grad = None


def copies_for_cache(problem: Inputs) -> int:
    """How many copies of the per-token inputs exceed the second-level cache of a CUDA device twice; 1 on the CPU."""
    return max(1, min(MAX_COPIES, -(-2 * cache_bytes(problem.device) // max(1, problem.rotating_bytes))))


def cache_bytes(device: torch.device) -> int:
    """Size of the second-level cache of a CUDA device; 0 on the CPU, where nothing takes turns."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def seconds(step: Step, problem: Inputs, backward: bool) -> float:
    """Duration of one step: CUDA events there, the wall clock on the CPU."""
    clear_gradients(problem)
    prepare(step, problem)
    if problem.device.type != "cuda":
        started = time.perf_counter()
        run_step(step, problem, backward)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run_step(step, problem, backward)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def alternate(
    steps: dict[str, Step], problems: Sequence[Inputs], repeats: int, backward: bool, short: bool = False
) -> dict[str, list[float] | Exception]:
    """Times in seconds of each step, taken in turns, every second round in reverse order.

    Each turn takes the next of `problems`, copies of the same inputs. A few first rounds on CUDA, and of `short` steps
    anywhere, are not kept. A step that fails, for want of memory say, leaves its exception in place of times and takes
    no further turn.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    failures: dict[str, Exception] = {}
    unused = max(WARM_UP[problems[0].device.type], SHORT_WARM_UP if short else 0)
    for turn in range(unused + repeats):
        problem = problems[turn % len(problems)]
        for name in [name for name in list(steps)[:: -1 if turn % 2 else 1] if name not in failures]:
            try:
                times[name].append(seconds(steps[name], problem, backward))
            except Exception as error:  # the other contenders go on
                failures[name] = error
            clear_gradients(problem)
    return {name: failures.get(name) or taken[unused:] for name, taken in times.items()}


def cuda_peak(step: Step, problem: Inputs, backward: bool = True) -> int:
    """Bytes that a step adds to what is allocated, at its peak, gradients included."""
    clear_gradients(problem)
    prepare(step, problem)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_step(step, problem, backward)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(work: Callable[[], object]) -> int:
    """Bytes by which `work` raises this process's resident memory at its peak (Linux).

    Raises:
        OSError: the system does not let a process reset its own peak.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024
