"""The sandbox of this machine: warm workers under bubblewrap, each of which serves one program at a time."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from spear_fast.envs.threads import Threads
from spear_fast.errors import TaskError

from .base import RunResult
from .jail import Interpreter, Jail, Limits, find_bubblewrap, free_uids
from .seccomp import filter_descriptor
from .worker import Program, Reply, Worker, WorkerLostError, WorkerStuckError


class _Call:
    """A run and the worker that it holds, so that a cancelled one can be cut short from the event loop's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._is_cancelled = False

    def hold(self, worker: Worker) -> None:
        with self._lock:
            self._worker = worker
            if self._is_cancelled:
                worker.kill()

    def release(self) -> None:
        with self._lock:
            self._worker = None

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._worker is not None:
                self._worker.kill()


class BubblewrapSandbox:
    """Runs programs in up to `workers` jails at once; may be used from several event loops, one after the other.

    A worker is kept for the next program; one that is killed, ends or cannot clean up is replaced by the next run.
    """

    def __init__(self, workers: int, limits: Limits, preload: Sequence[str], jail: Jail | None = None) -> None:
        """
        Args:
            workers: Programs at once.
            limits: Of each program.
            preload: Modules that are imported before a program starts.
            jail: Other than what fits this process.

        Raises:
            ConfigError: Bubblewrap is not installed, or cannot make a sandbox here.
        """
        find_bubblewrap()
        self._limits = limits
        self._jail = jail or Jail(Interpreter.own(), limits, preload, free_uids(workers))
        self._threads = Threads(workers)
        self._places = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._running: set[Worker] = set()
        self._free_slots = list(range(workers))
        self._is_closed = False
        # The kernel ends a worker together with the thread that started it.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox-starter")
        with filter_descriptor() as descriptor:
            self._jail.check(descriptor)

    async def run(
        self, code: str, *, timeout_s: float, stdin: str = "", files: Mapping[str, bytes] | None = None
    ) -> RunResult:
        """Run `code`; see `Sandbox.run`. A run that is cancelled takes its worker with it.

        Raises:
            TaskError: A name in `files` leads out of the working directory, or the sandbox is closed.
        """
        for name in files or {}:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name or not name:
                raise TaskError(f"sandbox: the file name {name!r} is not within the working directory; use a plain one")
        program = Program(_encoded(code), _encoded(stdin), dict(files or {}), timeout_s)
        call = _Call()
        try:
            result, error = await self._threads.run(lambda: self._run(program, call))
        except asyncio.CancelledError:
            call.cancel()
            raise
        if result is None:
            raise error or TaskError("sandbox: a run without result")
        return result

    def close(self) -> None:
        """End all workers. Runs that go on end as SandboxError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for worker in self._running:
                worker.kill()
        for worker in idle:
            worker.close()
        self._starter.shutdown(wait=False)

    def _run(self, program: Program, call: _Call) -> RunResult:
        """Take a worker, run, give it back or throw it away. In a thread."""
        with self._places:
            try:
                worker = self._take()
            except WorkerLostError as error:
                return RunResult("SandboxError", "Error", None, "", "", 0.0, str(error))
            is_usable = False
            try:
                call.hold(worker)
                worker.wait_ready()
                reply = worker.run(program)
                is_usable = not reply.is_last
                return self._result(reply)
            except WorkerStuckError as error:
                return RunResult("Failed", "TimeLimitExceeded", None, "", "", program.timeout_s, str(error))
            except WorkerLostError as error:
                return RunResult("SandboxError", "Error", None, "", "", 0.0, str(error))
            finally:
                call.release()
                self._give_back(worker, is_usable)

    def _take(self) -> Worker:
        """An idle worker that lives, or a new one."""
        with self._lock:
            if self._is_closed:
                raise WorkerLostError("the sandbox is closed")
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    self._running.add(worker)
                    return worker
                worker.close()
                self._free_slots.append(worker.slot)
            slot = self._free_slots.pop()
        try:
            worker = self._starter.submit(self._start, slot).result()
        except (OSError, RuntimeError) as error:
            with self._lock:
                self._free_slots.append(slot)
            raise WorkerLostError(f"a worker cannot be started: {error}") from error
        with self._lock:
            self._running.add(worker)
            if self._is_closed:
                worker.kill()
        return worker

    def _start(self, slot: int) -> Worker:
        with filter_descriptor() as descriptor:
            return Worker(self._jail.command(slot, descriptor), descriptor, slot, self._limits.output_bytes)

    def _give_back(self, worker: Worker, is_usable: bool) -> None:
        if not is_usable:
            worker.close()
        with self._lock:
            self._running.discard(worker)
            if is_usable and not self._is_closed:
                self._idle.append(worker)
                return
            self._free_slots.append(worker.slot)
        worker.close()

    def _result(self, reply: Reply) -> RunResult:
        most = self._limits.max_output_chars
        out, err = (data.decode("utf-8", "replace") for data in (reply.stdout, reply.stderr))
        notes = [f"{name} was cut at {most} characters" for name, text in (("stdout", out), ("stderr", err))
                 if len(text) >= most]  # fmt: skip
        if reply.stopped == "memory":
            notes.insert(0, f"Stopped: it held more than {self._limits.memory_mb} MiB of memory.")
            err = f"{err}\nMemoryError: more than {self._limits.memory_mb} MiB".lstrip()
        elif reply.return_code is not None and reply.return_code < 0 and not reply.stopped:
            notes.insert(0, f"Killed by {_signal_name(-reply.return_code)}.")
        return RunResult(
            "Success" if reply.return_code == 0 and not reply.stopped else "Failed",
            "TimeLimitExceeded" if reply.stopped == "time" else "Finished",
            reply.return_code,
            out[:most],
            err[-most:],
            reply.seconds,
            " ".join(notes),
        )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
