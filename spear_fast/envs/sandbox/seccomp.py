"""The system calls a sandboxed program may not make, as a classic BPF program for bubblewrap's --seccomp.

Denied is what namespaces and limits do not cover: making namespaces of one's own, mounts, other processes' memory and
limits, objects that outlive their process (System V IPC, message queues, keys), files that no limit counts (memfd), and
kinds of sockets that network namespaces do not separate (vsock). The rest is left to the kernel's own checks.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spear_fast.errors import ConfigError

_DENIED = {
    # name: (x86_64, aarch64)
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_OWN_PROCESS_ONLY = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
"""Their first argument is a process; 0 is the caller."""
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_NAMESPACES = 0x7E020080
"""CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS and NEWTIME."""
_SOCKET_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables, and AUDIT_ARCH."""
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the kernel's struct seccomp_data; of the argument the lower half, on little-endian machines."""
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


@dataclass(frozen=True)
class _Instruction:
    code: int
    value: int
    if_true: int = 0
    if_false: int = 0

    def packed(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.if_true, self.if_false, self.value)


def filter_program() -> bytes:
    """Return the filter for this machine as an array of struct sock_filter.

    Raises:
        ConfigError: The numbers of the system calls of this processor are not known here.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise ConfigError(
            f"sandbox.kind=bubblewrap: no filter of system calls for {machine!r} (known: {', '.join(_MACHINES)}); "
            "use kind=sandbox_fusion with a server elsewhere"
        )
    column, architecture = _MACHINES[machine]
    program = [
        _Instruction(_LOAD, _ARCHITECTURE),
        _Instruction(_JUMP_EQUAL, architecture, if_true=1),
        _Instruction(_RETURN, _KILL),
        _Instruction(_LOAD, _NUMBER),
        *_refused(_JUMP_GREATER_EQUAL, _X32_BIT, errno.ENOSYS),
        *_refused(_JUMP_EQUAL, _CLONE3[column], errno.ENOSYS),  # its flags are in memory; libc then uses clone
    ]
    for numbers in _DENIED.values():
        program += _refused(_JUMP_EQUAL, numbers[column], errno.EPERM)
    for numbers in _OWN_PROCESS_ONLY.values():
        program += _by_argument(numbers[column], [_Instruction(_JUMP_EQUAL, 0, if_true=1)], errno.EPERM)
    program += _by_argument(_CLONE[column], [_Instruction(_JUMP_ANY_BIT, _NAMESPACES, if_false=1)], errno.EPERM)
    last = len(_SOCKET_FAMILIES)
    families = [
        _Instruction(_JUMP_EQUAL, family, if_true=last - index) for index, family in enumerate(_SOCKET_FAMILIES)
    ]
    program += _by_argument(_SOCKET[column], families, errno.EAFNOSUPPORT)
    program.append(_Instruction(_RETURN, _ALLOW))
    return b"".join(instruction.packed() for instruction in program)


@contextmanager
def filter_descriptor() -> Iterator[int]:
    """Give a descriptor from which the filter can be read once. Raises as `filter_program`."""
    program = filter_program()
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, program)  # far less than a pipe holds
        os.close(write_end)
        yield read_end
    finally:
        os.close(read_end)


def _refused(jump: int, number: int, error: int) -> list[_Instruction]:
    """Fail with `error` if the loaded number compares so."""
    return [_Instruction(jump, number, if_false=1), _failing(error)]


def _by_argument(number: int, tests: list[_Instruction], error: int) -> list[_Instruction]:
    """For one call, load its first argument; `tests` jump over the failure if it is all right."""
    inner = [_Instruction(_LOAD, _FIRST_ARGUMENT), *tests, _failing(error), _Instruction(_RETURN, _ALLOW)]
    return [_Instruction(_JUMP_EQUAL, number, if_false=len(inner)), *inner]


def _failing(error: int) -> _Instruction:
    return _Instruction(_RETURN, 0x00050000 | error)
