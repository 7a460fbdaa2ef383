"""Runs inside the sandbox: imports what programs need, then forks a fresh process for each program.

It is the first process of its own PID namespace. So it cannot be killed from inside, all that a program leaves behind
becomes its child, and `kill(-1)` reaches everything but itself. Programs share neither its descriptors nor, where it
is root, its user. Standard library only: nothing of this project is visible in the sandbox.

Protocol: one line of JSON, then the raw bytes that the line announces, in both directions. See worker.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import json
import linecache
import os
import resource
import select
import shutil
import signal
import site
import sys
import threading
import time
import traceback
import types
from typing import Any, BinaryIO, NoReturn, TextIO

Request = dict[str, Any]

WRITABLE = ("/tmp", "/dev/shm")
WORK = "/tmp/work"
PROGRAM = "main.py"
"""The name of the program in tracebacks."""
WATCH_S = 0.05
"""Seconds between two looks at the memory of a program."""
CHUNK = 1 << 16
PR_SET_DUMPABLE = 4
PAGE = resource.getpagesize()


class Capture:
    """One output stream of a program: its first bytes are kept, or its last, the others are read and dropped."""

    def __init__(self, most: int, keep_last: bool) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self._kept = bytearray()
        self._most = most
        self._keep_last = keep_last

    def content(self) -> bytes:
        """Return what is kept."""
        return bytes(self._kept[-self._most :] if self._keep_last else self._kept[: self._most])

    def drain(self) -> bool:
        """Read what is there; return False when nothing can follow. Bounded, so that a flood cannot hold us here."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                data = os.read(self.read_end, CHUNK)
                if not data:
                    return False
                if self._keep_last or len(self._kept) < self._most:
                    self._kept += data
                if self._keep_last and len(self._kept) > 2 * self._most:
                    del self._kept[: -self._most]
        return True


class Zygote:
    """Serves requests, one at a time."""

    def __init__(self, settings: dict[str, Any], requests: BinaryIO, replies: BinaryIO) -> None:
        self._settings = settings
        self._requests = requests
        self._replies = replies
        self._base_pages = _resident_pages("self")

    def serve(self) -> None:
        """Answer until the other side closes, or until a program left something that cannot be removed."""
        while line := self._requests.readline():
            request = json.loads(line)
            request["code"] = self._requests.read(request["code"])
            request["stdin"] = self._requests.read(request["stdin"])
            request["files"] = [(name, self._requests.read(size)) for name, size in request["files"]]
            if not self._answer(request):
                return

    def _answer(self, request: Request) -> bool:
        most = self._settings["output_bytes"]
        # A traceback says what is wrong at its end.
        captures = Capture(most, keep_last=False), Capture(most, keep_last=True)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become_program(request, *captures)
        for capture in captures:
            os.close(capture.write_end)
        stopped = self._watch(pid, captures, began + request["timeout_s"])
        return_code = _end_all(pid)
        seconds = time.monotonic() - began
        for capture in captures:
            capture.drain()
            os.close(capture.read_end)
        is_clean = _wiped()
        out, err = (capture.content() for capture in captures)
        head = {
            "return_code": return_code,
            "stopped": stopped,
            "seconds": seconds,
            "is_last": not is_clean,
            "sizes": [len(out), len(err)],
        }
        self._replies.write(json.dumps(head).encode() + b"\n" + out + err)
        self._replies.flush()
        return is_clean

    def _watch(self, pid: int, captures: tuple[Capture, Capture], deadline: float) -> str:
        """Collect the output until the program ends; return "" or what it must be stopped for: "time" or "memory"."""
        poll = select.poll()
        ended = os.pidfd_open(pid)
        poll.register(ended, select.POLLIN)
        poll.register(self._requests.fileno(), 0)  # tells only when the other side is gone
        open_ends = {capture.read_end: capture for capture in captures}
        for end in open_ends:
            poll.register(end, select.POLLIN)
        next_look = time.monotonic() + WATCH_S
        try:
            while (now := time.monotonic()) < deadline:
                if now >= next_look:
                    if self._held_bytes() > self._settings["memory_bytes"]:
                        return "memory"
                    next_look = now + WATCH_S
                ready = dict(poll.poll(max(1, int(1000 * min(WATCH_S, deadline - now)))))
                if self._requests.fileno() in ready:
                    os._exit(0)
                for end in open_ends.keys() & ready.keys():
                    if not open_ends[end].drain():
                        poll.unregister(end)
                if ended in ready:
                    return ""
            return "time"
        finally:
            os.close(ended)

    def _held_bytes(self) -> int:
        """Memory of all processes of the program beyond what each shares with this one since the fork."""
        pids = (name for name in os.listdir("/proc") if name.isdigit() and name != "1")
        return PAGE * sum(max(0, _resident_pages(pid) - self._base_pages) for pid in pids)

    def _become_program(self, request: Request, out: Capture, err: Capture) -> NoReturn:
        """In the fork: give up all that is not the program's, then run it. Never returns."""
        code = 1
        try:
            os.setsid()
            stdin = _stdin_file(request["stdin"])
            for target, source in enumerate((stdin, out.write_end, err.write_end)):
                os.dup2(source, target)
            os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            os.mkdir(WORK)
            os.chmod(WORK, 0o777)
            _open_standard_streams()
            self._limit(request["timeout_s"])
            _become_unprivileged(self._settings["program_uid"])
            os.chdir(WORK)
            _write_files(request["files"])
            _fresh_chance()
            code = _execute(request["code"].decode("utf-8", "replace"))
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def _limit(self, timeout_s: float) -> None:
        settings, seconds = self._settings, int(timeout_s) + 2
        for kind, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, settings["memory_bytes"]),
            (resource.RLIMIT_NPROC, settings["max_processes"]),
            (resource.RLIMIT_FSIZE, settings["disk_bytes"]),
            (resource.RLIMIT_NOFILE, settings["max_files"]),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))


def _resident_pages(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1])
    except OSError:
        return 0


def _end_all(pid: int) -> int | None:
    """Kill every process but this one, reap them all, and return the return code of `pid`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    return_code = None
    while True:
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return return_code
        if ended == pid:
            return_code = os.waitstatus_to_exitcode(status)


def _wiped() -> bool:
    """Whether nothing that the program wrote is left; if not, this sandbox must not be used again."""
    try:
        for folder in WRITABLE:
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
    except (OSError, RecursionError):
        return False
    return True


def _stdin_file(content: bytes) -> int:
    if not content:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open("/tmp/stdin", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("/tmp/stdin")
    with open(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _open_standard_streams() -> None:
    """Text streams over descriptors 0 to 2; by line, so that a program which is stopped has shown what it printed."""
    sys.stdin = sys.__stdin__ = _stream(0, "r", "replace")
    sys.stdout = sys.__stdout__ = _stream(1, "w", "replace")
    sys.stderr = sys.__stderr__ = _stream(2, "w", "backslashreplace")


def _stream(descriptor: int, mode: str, errors: str) -> TextIO:
    binary = os.fdopen(descriptor, mode + "b", closefd=False)
    return io.TextIOWrapper(binary, encoding="utf-8", errors=errors, line_buffering=True)


def _become_unprivileged(uid: int | None) -> None:
    """Change to `uid` if there is one, which gives up all capabilities, and behave as a program started afresh."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _set_dumpable(True)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # out of memory: rather the program than anything else on this machine
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _write_files(files: list[tuple[str, bytes]]) -> None:
    for name, content in files:
        folder = os.path.dirname(name)
        if folder:
            os.makedirs(folder, exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)


def _fresh_chance() -> None:
    """Python's generator seeds itself after a fork, numpy's does not."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _execute(source: str) -> int:
    """Run the program as `python main.py` would; return its return code."""
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = PROGRAM
    sys.modules["__main__"] = module
    sys.argv = [PROGRAM]
    linecache.cache[PROGRAM] = (len(source), None, source.splitlines(keepends=True), PROGRAM)
    code = 0
    try:
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException as error:
        # Its first frame is this one.
        traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(BaseException):
            stream.flush()  # type: ignore[union-attr]


def _set_dumpable(value: bool) -> None:
    """Whether processes of the same user may look into this one."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, int(value), 0, 0, 0)


def _take_over_wire() -> tuple[BinaryIO, BinaryIO]:
    """The connection, moved away from descriptors 0 and 1."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return requests, replies


def main() -> None:
    """Import, harden, tell that we are ready, serve."""
    settings = json.loads(sys.argv[1])
    requests, replies = _take_over_wire()
    sys.path += settings["site_folders"]
    site.setquit()
    site.sethelper()
    for name in settings["preload"]:
        __import__(name)
    # As the first process of its namespace it cannot be hit by signals that it does not handle.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _set_dumpable(False)
    gc.collect()
    gc.freeze()  # a collection in a program would otherwise copy the pages of everything imported
    zygote = Zygote(settings, requests, replies)
    replies.write(b'{"ready": true}\n')
    replies.flush()
    os.dup2(0, 2)
    zygote.serve()


if __name__ == "__main__":
    main()
