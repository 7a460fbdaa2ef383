"""The sandbox as an ordinary user gets it, in a user namespace, also where root runs the tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from spear_fast.envs.sandbox.bubblewrap import BubblewrapSandbox
from spear_fast.envs.sandbox.jail import Interpreter, Jail, Limits

ORDINARY_USER = 60_321


class OrdinaryUsersJail(Jail):
    """What an ordinary user would get. Started by root, who first becomes one."""

    def _python(self, filter_fd: int) -> list[str]:
        words = super()._python(filter_fd)
        if os.geteuid() != 0:
            return words
        user = str(ORDINARY_USER)
        return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all", *words]


def ordinary_users_sandbox(workers: int, limits: Limits, preload: Sequence[str]) -> BubblewrapSandbox:
    interpreter = Interpreter.own()
    if os.geteuid() == 0:
        # Our own interpreter may lie where only root can read.
        system = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
        interpreter = Interpreter(Path("/usr"), Path(system).resolve().relative_to("/usr"), (Path("/usr/lib"),))
    jail = OrdinaryUsersJail(interpreter, limits, preload, None)
    return BubblewrapSandbox(workers, limits, preload, jail)
