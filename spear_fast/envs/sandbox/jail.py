"""The command line that starts a worker under bubblewrap: what it sees, what it may do, and whether that works here.

As root no user namespace is made: the zygote keeps the four capabilities it needs and each program runs as a user of
its worker's own, since the kernel does not count the processes of the real root. As any other user bubblewrap makes a
user namespace, in which zygote and program are the same user.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spear_fast.errors import ConfigError

MIB = 1 << 20
MOST_WORKERS = 256
INSTALL = "Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap"
OTHER_WAYS = (
    "or set kind=sandbox_fusion with the url of a SandboxFusion server, or choose the weaker kind=monty by its name"
)
_FREE_UIDS = 0x7000_0000
"""First of the users that Linux distributions and systemd leave unused; the last is 0x7FFFFFFF."""
_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_DAC_OVERRIDE")
_PER_NAMESPACE_SINCE = (5, 14)
"""Linux before it counts a user's processes over all user namespaces, those of the training run included."""
_PROBE_S = 60.0


@dataclass(frozen=True)
class Limits:
    """What one program may take."""

    memory_mb: int
    max_output_chars: int
    max_processes: int
    disk_mb: int
    max_files: int = 64
    """Open files of a process."""

    @property
    def output_bytes(self) -> int:
        """Bytes that hold `max_output_chars` characters whatever they are."""
        return 4 * self.max_output_chars


@dataclass(frozen=True)
class Interpreter:
    """The Python that programs run on, as it lies on this machine."""

    prefix: Path
    executable: Path
    """Relative to the prefix."""
    site_folders: tuple[Path, ...]

    @classmethod
    def own(cls) -> Interpreter:
        """Return the interpreter of this process and its installed packages. Raises ConfigError for an odd layout."""
        prefix = Path(sys.base_prefix).resolve()
        executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
        if not executable.is_relative_to(prefix):
            raise ConfigError(
                f"sandbox.kind=bubblewrap: the interpreter {executable} is not under its prefix {prefix}; use one from "
                f"your distribution, pyenv, uv or conda, {OTHER_WAYS}"
            )
        folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        return cls(prefix, executable.relative_to(prefix), tuple(folder for folder in folders if folder.is_dir()))


@dataclass(frozen=True)
class Jail:
    """How workers are shut in. `program_uids` is None where bubblewrap makes a user namespace instead."""

    interpreter: Interpreter
    limits: Limits
    preload: Sequence[str]
    program_uids: Sequence[int] | None

    def command(self, slot: int, filter_fd: int) -> list[str]:
        """Return the command line of worker `slot`, which reads its system call filter from `filter_fd`."""
        zygote = Path(__file__).with_name("zygote.py").read_text(encoding="utf-8")
        settings = {
            "program_uid": self.program_uids[slot] if self.program_uids else None,
            "site_folders": self._site_folders,
            "preload": list(self.preload),
            "output_bytes": self.limits.output_bytes,
            "memory_bytes": self.limits.memory_mb * MIB,
            "disk_bytes": self.limits.disk_mb * MIB,
            "max_files": self.limits.max_files,
            # The zygote is counted too where it is the same user.
            "max_processes": self.limits.max_processes + (self.program_uids is None),
        }
        return [*self._python(filter_fd), "-c", zygote, json.dumps(settings)]

    def check(self, filter_fd: int) -> None:
        """Start Python in it, import what workers preload, and end. Raises ConfigError with what it says."""
        modules = ", ".join(["ctypes", "resource", "select", *self.preload])
        command = [*self._python(filter_fd), "-c", f"import sys; sys.path += {self._site_folders!r}; import {modules}"]
        try:
            done = subprocess.run(command, pass_fds=[filter_fd], capture_output=True, timeout=_PROBE_S, check=False)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"sandbox.kind=bubblewrap: no answer within {_PROBE_S} s when tried; try it by hand"
            ) from None
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"return code {done.returncode}"]
            raise ConfigError(
                f"sandbox.kind=bubblewrap cannot make a sandbox here: {said[-1]!r}. In a container, allow namespaces "
                f"(docker: --privileged, or --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt "
                f"systempaths=unconfined); elsewhere set kernel.unprivileged_userns_clone=1; {OTHER_WAYS}"
            )

    @property
    def _site_folders(self) -> list[str]:
        """Where the interpreter's site-packages lie inside."""
        return [f"/site/{index}" for index in range(len(self.interpreter.site_folders))]

    def _python(self, filter_fd: int) -> list[str]:
        python = Path("/py") / self.interpreter.executable
        # -S: what the prefix itself has installed stays out. Never -E or -I: they would drop PYTHONHASHSEED.
        return [find_bubblewrap(), *self._namespaces(), *self._files(), *_environment(), "--seccomp", str(filter_fd),
                "--", str(python), "-S", "-s", "-B", "-X", "utf8"]  # fmt: skip

    def _namespaces(self) -> list[str]:
        words = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        words += ["--hostname", "sandbox", "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        if self.program_uids is None:
            return [*words, "--unshare-user", "--uid", "1000", "--gid", "1000"]
        return [*words, *(word for name in _CAPABILITIES for word in ("--cap-add", name))]

    def _files(self) -> list[str]:
        words = ["--ro-bind", "/usr", "/usr", "--ro-bind", str(self.interpreter.prefix), "/py"]
        for name in ("bin", "sbin", "lib", "lib64"):
            path = Path("/") / name
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                words += ["--ro-bind", str(path), str(path)]
        words += ["--perms", "0755", "--dir", "/site"]  # made along the way, it would be closed to other users
        for folder, place in zip(self.interpreter.site_folders, self._site_folders, strict=True):
            words += ["--ro-bind", str(folder), place]
        words += ["--proc", "/proc", "--dev", "/dev"]
        for folder in ("/dev/shm", "/tmp"):
            words += ["--perms", "1777", "--size", str(self.limits.disk_mb * MIB), "--tmpfs", folder]
        return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _environment() -> list[str]:
    """All that programs find in their environment. One thread per program: they run beside each other."""
    values = {
        "PATH": "/py/bin:/usr/bin:/bin",
        "HOME": "/tmp/work",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": "/py/lib",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    return ["--clearenv", *(word for name, value in values.items() for word in ("--setenv", name, value))]


def find_bubblewrap() -> str:
    """Return the path of bwrap. Raises ConfigError, saying how to install it, where it is absent."""
    found = shutil.which("bwrap")
    if found is None:
        raise ConfigError(
            f"sandbox.kind=bubblewrap: the program bwrap is not on PATH; install it ({INSTALL}), {OTHER_WAYS}"
        )
    return found


def free_uids(count: int) -> list[int] | None:
    """Return as many users that nobody else has, or None if this process cannot run programs as other users.

    Which ones is left to chance, so that the workers of several processes on one machine are not counted together.

    Raises:
        ConfigError: Neither other users nor a user namespace would bound the processes of a program.
    """
    if os.geteuid() == 0:
        mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        first, _, length = mapped[-1]
        if first + length > _FREE_UIDS + (1 << 28):
            start = _FREE_UIDS + MOST_WORKERS * secrets.randbelow(1 << 20)
            return list(range(start, start + count))
        if length >= 4 * MOST_WORKERS:
            return list(range(first + length - count, first + length))
    if _kernel() < _PER_NAMESPACE_SINCE:
        raise ConfigError(
            f"sandbox.kind=bubblewrap: Linux {platform.release()} counts processes over all namespaces of a user, so a "
            f"limit for programs would hit this run too; run as root, or on Linux 5.14 or later, {OTHER_WAYS}"
        )
    return None


def _kernel() -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
