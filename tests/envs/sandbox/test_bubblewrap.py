"""The pool of workers: what programs get, who waits, what a cancelled or dead worker means, refusals at the start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear_fast.envs.sandbox import jail, seccomp, worker
from spear_fast.envs.sandbox.bubblewrap import BubblewrapSandbox
from spear_fast.envs.sandbox.choose import SandboxParams, make_sandbox
from spear_fast.envs.sandbox.jail import Limits, free_uids
from spear_fast.envs.sandbox.worker import Program, Worker, WorkerLostError, WorkerStuckError
from spear_fast.errors import ConfigError, TaskError
from spear_fast.rollout.timeouts import within

LIMITS = Limits(memory_mb=1024, max_output_chars=1000, max_processes=16, disk_mb=16)


@pytest.fixture(scope="module")
def one() -> Iterator[BubblewrapSandbox]:
    """A sandbox with a single worker."""
    sandbox = BubblewrapSandbox(1, LIMITS, [])
    yield sandbox
    sandbox.close()


def run(sandbox: BubblewrapSandbox, code: str, timeout_s: float = 20.0, **more):
    return asyncio.run(sandbox.run(code, timeout_s=timeout_s, **more))


def test_preloaded_modules_are_there_and_chance_is_fresh():
    sandbox = make_sandbox(SandboxParams(workers=1, preload=["numpy", "sympy"]))
    code = """
import random, sys
print("sympy" in sys.modules)
import numpy, sympy
print(sympy.factorint(2**31 - 2), numpy.linalg.inv(numpy.eye(2)).sum())
print(random.random(), numpy.random.rand())
"""
    try:
        first, second = (asyncio.run(sandbox.run(code, timeout_s=30.0)) for _ in range(2))
    finally:
        sandbox.close()
    lines = [result.stdout.splitlines() for result in (first, second)]
    assert first.stderr == ""
    assert lines[0][:2] == lines[1][:2] == ["True", "{2: 1, 3: 2, 7: 1, 11: 1, 31: 1, 151: 1, 331: 1} 2.0"]
    draws = [number for each in lines for number in each[2].split()]
    assert len(set(draws)) == 4, "a program must not repeat the random numbers of another"


def test_a_program_runs_like_a_script(one):
    code = """
import __main__, sys, atexit, threading, pickle
from dataclasses import dataclass
@dataclass
class Point:
    x: int
print(__name__, sys.argv, pickle.loads(pickle.dumps(Point(3))) == __main__.Point(3), __annotations__ if False else "")
annotated: undefined_name if False else int = 1
atexit.register(print, "at the end")
threading.Thread(target=print, args=("in a thread",)).start()
print(input(), sys.stdin.read(), open("data/table.csv").read())
exit(0)
"""
    result = run(one, code, stdin="first\nrest", files={"data/table.csv": b"1,2"})
    assert result.stderr == ""
    assert result.stdout.splitlines()[0].startswith("__main__ ['main.py'] True")
    assert sorted(result.stdout.splitlines()[1:]) == ["at the end", "first rest 1,2", "in a thread"]
    failing = run(one, "import os\n\ndef f():\n    return 1 / 0\nf()")
    assert failing.stderr.splitlines()[1:5] == [
        '  File "main.py", line 5, in <module>', "    f()", '  File "main.py", line 4, in f', "    return 1 / 0"
    ]  # fmt: skip
    assert run(one, "def f(:").stderr.splitlines()[-1].startswith("SyntaxError")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_files_stay_in_the_working_directory(one, name):
    with pytest.raises(TaskError, match="file name"):
        run(one, "print(1)", files={name: b""})


def test_output_is_cut_at_its_head_and_errors_at_their_tail(one):
    result = run(one, "import sys\nprint('ä' * 5000)\nprint('b' * 5000 + 'end', file=sys.stderr)")
    assert result.stdout == "ä" * 1000 and len(result.stderr) == 1000 and result.stderr.endswith("end\n")
    assert "stdout was cut at 1000 characters" in result.message


def test_waiting_for_a_worker_does_not_count(one):
    async def many() -> list:
        code = "import time\ntime.sleep(0.5)\nprint(1)"
        # The last one waits longer than it may run, and each has several times what it needs.
        return await asyncio.gather(*(within(one.run(code, timeout_s=2.0), 2.4) for _ in range(6)))

    assert [result.stdout for result in asyncio.run(many())] == ["1\n"] * 6


def test_no_more_programs_at_once_than_workers_and_the_loop_goes_on():
    sandbox = BubblewrapSandbox(2, LIMITS, [])
    code = "import time\nbegan = time.monotonic()\ntime.sleep(0.15)\nprint(began, time.monotonic())"
    ticks = 0

    async def many() -> list:
        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        results = await asyncio.gather(*(sandbox.run(code, timeout_s=20.0) for _ in range(6)))
        ticking.cancel()
        return results

    spans = [tuple(map(float, result.stdout.split())) for result in asyncio.run(many())]
    sandbox.close()
    overlaps = [sum(began <= start < ended for began, ended in spans) for start, _ in spans]
    assert max(overlaps) == 2
    assert ticks > 3


def test_two_event_loops_at_once_share_the_workers(one):
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(run(one, "print(2)"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stdout for result in results] == ["2\n"] * 4


def test_a_cancelled_run_takes_its_worker_with_it(one):
    run(one, "print(1)")
    process = one._idle[0]._process

    async def cancelled() -> str:
        with pytest.raises(TimeoutError):
            await within(one.run("while True: pass", timeout_s=600.0), 0.3)
        return (await one.run("print('next')", timeout_s=20.0)).stdout

    assert asyncio.run(cancelled()) == "next\n"
    assert process.poll() is not None and one._idle[0]._process is not process


def test_a_worker_that_died_is_replaced(one):
    run(one, "print(1)")
    idle = one._idle[0]._process
    idle.kill()
    idle.wait()
    assert run(one, "print(2)").stdout == "2\n"

    async def killed_in_a_run():
        running = asyncio.create_task(one.run("import time\ntime.sleep(60)", timeout_s=60.0))
        while not one._running:
            await asyncio.sleep(0.01)
        next(iter(one._running)).kill()
        return await running

    assert asyncio.run(killed_in_a_run()).status == "SandboxError"
    assert run(one, "print(3)").stdout == "3\n"


def test_closing_ends_what_runs():
    sandbox = BubblewrapSandbox(1, LIMITS, [])

    async def closed_in_a_run():
        running = asyncio.create_task(sandbox.run("import time\ntime.sleep(60)", timeout_s=60.0))
        while not sandbox._running:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(sandbox.close)
        return await running

    assert asyncio.run(closed_in_a_run()).status == "SandboxError"


def test_workers_end_with_the_process_that_started_them():
    code = """
import asyncio, os, signal
from spear_fast.envs.sandbox.choose import SandboxParams, make_sandbox
sandbox = make_sandbox(SandboxParams(workers=1, preload=[]))
asyncio.run(sandbox.run("print(1)", timeout_s=30.0))
pid = sandbox._idle[0]._process.pid
print(pid, open(f"/proc/{pid}/task/{pid}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(1000):
        if not any(_is_running(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"some of {pids} still run")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_refusals_before_any_work_starts(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"preload=.*no_such_module"):
        make_sandbox(SandboxParams(preload=["no_such_module"]))
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match=r"No permissions.*SYS_ADMIN.*kind=monty"):
        make_sandbox(SandboxParams())
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"apt install bubblewrap.*dnf.*pacman.*sandbox_fusion.*kind=monty"):
        make_sandbox(SandboxParams())


def test_users_for_programs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mapped = "0 0 4294967295\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mapped)
    found = free_uids(256)
    assert found is not None and len(set(found)) == 256 and 0x7000_0000 <= min(found) <= max(found) < 1 << 31
    mapped = "0 1000 1\n1 100000 65536\n"
    assert free_uids(4) == [65533, 65534, 65535, 65536]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert free_uids(4) is None
    monkeypatch.setattr(jail.platform, "release", lambda: "5.10.0-30-amd64")
    with pytest.raises(ConfigError, match=r"5\.10.*run as root"):
        free_uids(4)


def test_an_unknown_processor_is_refused(monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="riscv64"):
        seccomp.filter_program()
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    assert len(seccomp.filter_program()) % 8 == 0


def fake_worker(answer: str) -> Worker:
    """A process that says it is ready and answers everything with `answer`."""
    code = f"import sys, time\nprint('{{}}', flush=True)\nsys.stdin.readline()\n{answer}\ntime.sleep(60)"
    with open(os.devnull) as nothing:
        return Worker([sys.executable, "-c", code], nothing.fileno(), 0, output_bytes=100)


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "{}",
        '{"return_code": 0, "stopped": "", "seconds": 0, "is_last": false, "sizes": [101, 0]}',
        '{"return_code": 0, "stopped": "", "seconds": 0, "is_last": false, "sizes": [-1, 0]}',
        "x" * 9000,
    ],
)
def test_a_worker_is_not_believed_everything(line):
    started = fake_worker(f"print({line!r}, flush=True)")
    try:
        started.wait_ready()
        with pytest.raises(WorkerLostError, match="none"):
            started.run(Program(b"", b"", {}, 10.0))
    finally:
        started.close()


def test_a_stuck_worker_and_one_that_cannot_start(monkeypatch):
    monkeypatch.setattr(worker, "GRACE_S", 0.1)
    started = fake_worker("")
    try:
        started.wait_ready()
        with pytest.raises(WorkerStuckError):
            started.run(Program(b"", b"x" * (1 << 20), {}, 0.1))
    finally:
        started.close()
    with open(os.devnull) as nothing:
        broken = Worker([sys.executable, "-c", "raise SystemExit('no room')"], nothing.fileno(), 0, 100)
    with pytest.raises(WorkerLostError, match="no room"):
        broken.wait_ready()
    broken.close()


def test_a_module_that_only_this_process_finds_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="only_here"):
        make_sandbox(SandboxParams(preload=["only_here"]))
