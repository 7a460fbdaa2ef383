"""One worker as the training process sees it: starts the zygote, sends it programs, believes no more than it must.

Protocol: a line of JSON with sizes, then that many bytes, in both directions. Only the zygote holds the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_LINE = 4096
START_S = 120.0
"""Seconds for starting and importing, on a machine that is busy."""
GRACE_S = 15.0
"""Seconds beyond a program's own limit after which its worker counts as stuck."""


class WorkerLostError(Exception):
    """The worker ended or does not keep to the protocol."""


class WorkerStuckError(WorkerLostError):
    """The worker did not answer in time."""


@dataclass(frozen=True)
class Program:
    """What is to be run."""

    code: bytes
    stdin: bytes
    files: Mapping[str, bytes]
    timeout_s: float


@dataclass(frozen=True)
class Reply:
    """What the zygote says about a program."""

    return_code: int | None
    stopped: str
    """"time" or "memory" if the zygote stopped it, else empty."""
    seconds: float
    is_last: bool
    """Whether the worker ends now, since the program left something that cannot be removed."""
    stdout: bytes
    stderr: bytes


class Worker:
    """A started worker. `kill` may be called from any thread, the rest from one at a time."""

    def __init__(self, command: Sequence[str], filter_fd: int, slot: int, output_bytes: int) -> None:
        """Start it without waiting. The calling thread must live on: the worker ends with it."""
        self.slot = slot
        self._output_bytes = output_bytes
        self._is_ready = False
        self._buffer = b""
        self._lock = threading.Lock()
        self._killed: int | None = os.eventfd(0)
        self._process = subprocess.Popen(
            command, pass_fds=[filter_fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)

    def is_alive(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait until it has imported everything. Raises WorkerLostError with the last line of its stderr."""
        if not self._is_ready:
            try:
                self._read_line(time.monotonic() + START_S)
            except WorkerLostError as error:
                raise WorkerLostError(f"the worker did not start: {self._last_words() or error}") from error
            self._is_ready = True

    def run(self, program: Program) -> Reply:
        """Run a program. Raises WorkerLostError; then the worker is of no use any more."""
        deadline = time.monotonic() + program.timeout_s + GRACE_S
        self._write(_request(program), deadline)
        line = self._read_line(deadline)
        try:
            head: dict[str, Any] = json.loads(line)
            out, err = (int(size) for size in head["sizes"])
            if not (0 <= out <= self._output_bytes and 0 <= err <= self._output_bytes):
                raise ValueError("sizes")
            reply = head["return_code"], str(head["stopped"]), float(head["seconds"]), bool(head["is_last"])
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerLostError("the worker gave an answer that is none") from error
        output = self._read(out + err, deadline)
        return Reply(*reply, output[:out], output[out:])

    def kill(self) -> None:
        """End it and everything in its namespace, and the wait for its answer.

        Bubblewrap that is killed takes the zygote along, unless it is just being set up. Such a zygote ends when its
        connection is closed, which is left to the thread that uses it.
        """
        with self._lock:
            if self._killed is not None:
                self._process.kill()
                os.eventfd_write(self._killed, 1)

    def close(self) -> None:
        """End it and free what it took."""
        self.kill()
        with self._lock:
            if self._killed is not None:
                os.close(self._killed)
                self._killed = None
        self._process.wait()
        for pipe in (self._in, self._out, self._err):
            with contextlib.suppress(OSError):
                pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._in.fileno(), select.POLLOUT, deadline)
            try:
                view = view[os.write(self._in.fileno(), view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerLostError("the worker has ended") from error

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST_LINE:
                raise WorkerLostError("the worker gave an answer that is none")
            self._fill(deadline)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._fill(deadline)
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _fill(self, deadline: float) -> None:
        self._wait(self._out.fileno(), select.POLLIN, deadline)
        data = os.read(self._out.fileno(), 1 << 16)
        if not data:
            raise WorkerLostError("the worker has ended")
        self._buffer += data

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        if self._killed is None:
            raise WorkerLostError("the worker is closed")
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._killed, select.POLLIN)
        ready = dict(poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))))
        if not ready:
            raise WorkerStuckError("the worker gave no answer in time")
        if self._killed in ready:
            raise WorkerLostError("the worker was ended")

    def _last_words(self) -> str:
        try:
            said = os.read(self._err.fileno(), 1 << 16).decode("utf-8", "replace").strip()
        except BlockingIOError:
            return ""
        return said.splitlines()[-1] if said else ""


def _request(program: Program) -> bytes:
    head = {
        "code": len(program.code),
        "stdin": len(program.stdin),
        "files": [(name, len(content)) for name, content in program.files.items()],
        "timeout_s": program.timeout_s,
    }
    return b"".join([json.dumps(head).encode(), b"\n", program.code, program.stdin, *program.files.values()])
