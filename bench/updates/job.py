"""One policy update on frozen rollouts: what a trainer is given, what it gives back, and how its steps are clocked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.updates.frozen import Frozen
from bench.updates.shared_losses import SharedLoss

NO_CLIP = 1e30
"""A gradient norm that is never reached, so that gradients stay as they are."""
Phases = dict[str, float]
"""Seconds of an optimizer step: `total`, and of that `gradients` (forward, backward, clipping) and `optimizer`."""


@dataclass(frozen=True)
class Job:
    """Optimizer steps over a whole frozen batch each, from the float32 weights in a folder."""

    folder: Path
    """Model and tokenizer."""
    frozen: Frozen
    loss: SharedLoss
    device: str
    """"cpu" or "cuda"."""
    dtype: str = "float32"
    """Of forward and backward passes; weights and optimizer are float32."""
    lr: float = 1e-6
    grad_clip: float = 1.0

    def unclipped(self) -> Job:
        """The same, with gradients as they come from the loss."""
        return replace(self, grad_clip=NO_CLIP)


@dataclass(frozen=True)
class Gradients:
    """What one step computed."""

    loss: float
    of: dict[str, torch.Tensor]
    """Gradient of each parameter by its Hugging Face name, on the CPU."""


class Trainer(Protocol):
    """A trainer set up for a job; `close` it before the next one is made."""

    settings: dict[str, Any]
    """What it chose, or was told, beyond the job."""

    def steps(self, count: int) -> list[Phases]:
        """Take this many optimizer steps and clock each."""
        ...

    def gradients(self) -> Gradients:
        """Take one step and return loss and gradients as the optimizer found them."""
        ...

    def score(self) -> float:
        """Seconds of a forward pass that gives the log-probs of all action tokens, without gradients."""
        ...

    def close(self) -> None:
        """Leave no process group and no memory."""
        ...


class Clock:
    """Seconds between marks, on CUDA by events, so that marks do not make the host wait."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin, once all earlier work is done."""
        if self._cuda:
            torch.cuda.synchronize()
        self._marks = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """The end of a phase."""
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def stop(self) -> Phases:
        """Seconds of the marked phases, and `total`."""
        self.mark("end")
        if self._cuda:
            torch.cuda.synchronize()
        phases = {
            name: _between(before, now)
            for (_, before), (name, now) in zip(self._marks, self._marks[1:], strict=False)
            if name != "end"
        }
        return phases | {"total": _between(self._marks[0][1], self._marks[-1][1])}


def _between(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(now, torch.cuda.Event)
        return before.elapsed_time(now) / 1e3
    assert not isinstance(now, torch.cuda.Event)
    return now - before


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of `work`."""
    clock = Clock(device)
    clock.start()
    work()
    return clock.stop()["total"]


@torch.no_grad()
def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that a model holds, whole, by name, float32 on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", lambda gradient=parameter.grad: gradient)()
            found[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return found


@contextmanager
def restored_module(model_type: str) -> Iterator[None]:
    """Put back, at the end, what was replaced in transformers' module of a model family, as Liger does process-wide."""
    module = sys.modules.get(f"transformers.models.{model_type}.modeling_{model_type}")
    before = dict(vars(module)) if module is not None else {}
    try:
        yield
    finally:
        if module is not None:
            vars(module).update(before)
