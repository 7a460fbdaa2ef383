"""The process that checks answers: a script that its parent kills when an answer takes too long.

Some scorers of reasoning-gym call eval() on the answer, and sympy's parser evaluates too. So this process begins with
an empty environment, and an answer that could call something gets a fork of its own, which leaves no trace in the next
and in which Python neither starts processes, opens sockets, loads libraries of C, writes files nor reads any that is no
module. That is hardening; the sandbox is the place to run code.

It is run by path, so that it imports nothing of spear_fast. On standard input come pickled messages, each behind its
length in four bytes: a dictionary of `modules`, `datasets` and `limit_s`, then requests. On standard output: a byte
when ready, then one for each request.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

READY, RIGHT, WRONG, TIMED_OUT, FAILED = b"!", b"1", b"0", b"t", b"x"
MEMORY_BYTES = 4 << 30
"""Address space. Powers of huge numbers end here."""
OPEN_FLAGS_THAT_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WARM_UP = ("\\frac{1}{2}", "\\sqrt{2}x+1", "\\{1,2\\}", "[0,1)", "x=\\pi", "\\begin{pmatrix}1\\\\2\\end{pmatrix}")
"""Answers that load most of what math-verify needs."""
CALLS_NOTHING = re.compile(r"(?:[^().:@_]|[0-9]\.(?=[0-9]))*")
"""Text that evaluates neither a call nor an attribute nor an assignment."""
HARMLESS_EVENTS = {
    "array.__new__",
    "builtins.id",
    "code.__new__",
    "compile",
    "exec",
    "function.__new__",
    "gc.get_objects",
    "import",
    "marshal.loads",
    "object.__delattr__",
    "object.__getattr__",
    "object.__setattr__",
    "os.listdir",
    "os.scandir",
    "pickle.find_class",
    "sys._getframe",
    "sys.excepthook",
}
"""What computing and importing modules raise."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse, as an audit hook, whatever is not computing."""
    if event not in HARMLESS_EVENTS and not (event == "open" and _reads_a_module(*arguments)):
        raise PermissionError(f"an answer may not do {event}")


def _reads_a_module(path: object, mode: str | None, flags: int, *_: object) -> bool:
    return isinstance(path, str) and path.endswith((".py", ".pyc")) and not flags & OPEN_FLAGS_THAT_WRITE


class Judge:
    """Answers requests of the two kinds."""

    def __init__(self, modules: list[str], datasets: list[tuple[str, dict[str, Any]]]) -> None:
        """Import `modules` and make reasoning-gym's `datasets`, (name, settings) each: some read files or take long."""
        for name in modules:
            importlib.import_module(name)
        self._datasets = [_dataset(name, settings) for name, settings in datasets]
        self._warm_up(modules)

    def _warm_up(self, modules: list[str]) -> None:
        """Load what is imported late, so that no answer pays for it."""
        with contextlib.suppress(Exception):
            for answer in WARM_UP if "math_verify" in modules else ():
                self.equal(answer, answer)
        for dataset in self._datasets:
            with contextlib.suppress(Exception):
                entry = dataset[0]
                dataset.score_answer(entry["answer"], entry)

    def is_right(self, kind: str, *arguments: Any) -> bool:
        """Return what the method `kind` says of `arguments`."""
        return {"equal": self.equal, "score": self.score}[kind](*arguments)

    def equal(self, reference: str, answer: str) -> bool:
        """Return whether math-verify takes two answers in LaTeX for equal."""
        from math_verify import parse, verify

        # Without their own limits, which need signals and forks of this process: the parent holds the clock.
        sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=0, raise_on_error=True) for side in (reference, answer)]
        return verify(sides[0], sides[1], timeout_seconds=0, raise_on_error=True)

    def score(self, dataset: int, entry: dict[str, Any], answer: str) -> bool:
        """Return whether the scorer of the dataset at this place gives the full score of 1."""
        # Double underscores are the way from an expression to everything else in Python, and no part of an answer.
        return "__" not in answer and float(self._datasets[dataset].score_answer(answer, entry)) == 1.0


def _dataset(name: str, settings: dict[str, Any]) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, size=sys.maxsize, **settings)


def receive(stream: BinaryIO) -> Any:
    """Return the next message. Raises EOFError where the stream ends."""
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(head, "little")))


def in_fork(work: Callable[[], bool], limit_s: float) -> bytes:
    """Return what came of `work` in a fork, where Python is only let compute."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            sys.addaudithook(refuse)
            code = int(work())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: WRONG, 1: RIGHT, -signal.SIGALRM: TIMED_OUT}.get(code, FAILED)


def in_place(work: Callable[[], bool], limit_s: float) -> bytes:
    """Return what came of `work`; at the limit this process ends, by the signal's default action."""
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return RIGHT if work() else WRONG
    except BaseException:
        return FAILED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the input ends."""
    setup = receive(requests)
    judge = Judge(setup["modules"], setup["datasets"])
    reply = READY
    while True:
        replies.write(reply)
        replies.flush()
        kind, *arguments = receive(requests)
        run = in_fork if kind == "score" and not CALLS_NOTHING.fullmatch(arguments[-1]) else in_place
        reply = run(partial(judge.is_right, kind, *arguments), setup["limit_s"])


def main() -> None:
    """Limit this process, then serve."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What libraries print must not get between the replies.
    silent = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silent, standard)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError):
        serve(requests, replies)


if __name__ == "__main__":
    main()
