"""A process of its own for a trainer of the step benchmark, which takes a step when it is told to.

Commands come as lines of JSON on its input, answers leave on its output; what the libraries print goes to its errors.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from bench.common.failures import failed_row
from bench.common.machine import ROOT
from bench.steps.contender import Opening, StepReport, run

OPEN, STEP, CLOSE = "open", "step", "close"


class WorkerError(Exception):
    """A trainer could not be made or failed; text and `status` are for the table."""

    def __init__(self, reason: str, status: str = "failed") -> None:
        super().__init__(reason)
        self.status = status

    def row(self) -> dict[str, str]:
        """What the result file says of it."""
        return {"status": self.status, "reason": str(self)}


class WorkerLostError(WorkerError):
    """Its process ended, or gave no answer in time."""


class Worker:
    """The parent's end. One trainer is open at a time; the process stays for the next one."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        """`folder` takes what the process prints; an answer that takes longer than `patience_s` is a failure."""
        self._log = folder / f"worker-{time.monotonic_ns()}.log"
        self._patience_s = patience_s
        self._rest = b""
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.steps.worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def open(self, opening: Opening) -> None:
        """Build a trainer, which then waits for its first step. Raises WorkerError."""
        self._ask({OPEN: asdict(opening)})

    def step(self) -> StepReport:
        """Take a step. Raises WorkerError."""
        return StepReport(**self._ask({STEP: True}))

    def close(self) -> None:
        """End the open trainer. Raises WorkerError."""
        self._ask({CLOSE: True})

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerLostError(self._last_words()) from None
        answer = json.loads(self._line())
        if "reason" in answer:
            raise WorkerError(answer["reason"], answer["status"])
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        number, deadline = self._process.stdout.fileno(), time.monotonic() + self._patience_s
        while b"\n" not in self._rest:
            if not select.select([number], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerLostError(f"no answer within {self._patience_s:g} s")
            got = os.read(number, 1 << 16)
            if not got:
                raise WorkerLostError(self._last_words())
            self._rest += got
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        words = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process ended with code {self._process.wait()}: {words[-1] if words else 'it said nothing'}"


def serve(commands: TextIO, answers: TextIO) -> None:
    """Obey until the commands end."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def turn(report: StepReport | None) -> bool:
        answer({} if report is None else asdict(report))
        return STEP in json.loads(commands.readline() or "{}")

    for line in iter(commands.readline, ""):
        opening = Opening(**json.loads(line)[OPEN])
        last: dict[str, Any] = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                run(opening, turn, Path(folder))
        except Exception as error:
            last = failed_row(error)
        # Before the answer, upon which another process may ask for the memory, and once no exception holds it.
        _free()
        answer(last)


def _free() -> None:
    """Give the memory of a closed trainer back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Serve on the process's own input and output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
