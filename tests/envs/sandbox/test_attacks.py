"""Hostile programs are contained, leave nothing for the next one, and end in a result, and so does every trajectory."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.base import Info, StepResult, Tool
from spear_fast.envs.sandbox.base import Sandbox
from spear_fast.envs.sandbox.bubblewrap import BubblewrapSandbox
from spear_fast.envs.sandbox.tool import CodeInterpreter, shown
from spear_fast.envs.text import tool_call_message
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.envs.sandbox.attacks import ATTACKS, HONEST, HONEST_OUTPUT, LIMITS, SECRET, Attack
from tests.envs.sandbox.jails import ordinary_users_sandbox

EPISODE_LIMITS = EpisodeLimits(
    max_turns=4,
    max_turn_tokens=8000,
    max_tokens=40_000,
    temperature=1.0,
    tool_timeout_s=60.0,
    tool_retries=0,
    env_timeout_s=60.0,
    max_observation_chars=2000,
)


@pytest.fixture(scope="module", params=["own", "ordinary user"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[BubblewrapSandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEAR_TEST_SECRET", SECRET)
        made = BubblewrapSandbox(1, LIMITS, []) if request.param == "own" else ordinary_users_sandbox(1, LIMITS, [])
        yield made
        made.close()


def run(sandbox: Sandbox, code: str, timeout_s: float = 20.0, **more: Any):
    return asyncio.run(sandbox.run(code, timeout_s=timeout_s, **more))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_contained_and_without_effect_on_the_next_program(sandbox, attack):
    result = run(sandbox, attack.code, attack.timeout_s)
    assert (result.status, result.ending) == (attack.status, attack.ending), result
    assert re.search(attack.reads, shown(result, attack.timeout_s)), result
    assert len(result.stdout) <= LIMITS.max_output_chars and len(result.stderr) <= LIMITS.max_output_chars
    assert SECRET not in result.stdout + result.stderr
    after = run(sandbox, HONEST)
    assert (after.status, after.stdout) == ("Success", HONEST_OUTPUT), after


def test_nothing_listens_for_the_program(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        result = run(sandbox, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)")
        assert result.status == "Failed" and "ConnectionRefusedError" in result.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_environment_holds_nothing_of_ours(sandbox):
    assert os.environ["SPEAR_TEST_SECRET"] == SECRET
    result = run(sandbox, "import os\nprint(sorted(os.environ), os.uname().nodename)")
    assert "SPEAR" not in result.stdout and "sandbox" in result.stdout and socket.gethostname() not in result.stdout


def test_programs_have_no_rights_left(sandbox):
    result = run(sandbox, "print(open('/proc/self/status').read())")
    found = dict(re.findall(r"^(\w+):\s+(\S+)", result.stdout, re.MULTILINE))
    assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert found["Uid"] != "0"


class AttackEnv:
    """Task i is attack i: the policy is not asked, a script speaks for it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.tools: Sequence[Tool] = [CodeInterpreter(sandbox).code_interpreter]

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        attack = ATTACKS[options["index"]]
        self.tools = [CodeInterpreter(self._sandbox, attack.timeout_s).code_interpreter]
        return attack.name, Info()

    async def step(self, text: str) -> StepResult:
        return "", 1.0, True, False, Info(won=True)

    async def close(self) -> None:
        pass


class AttackTasks:
    name = "attacks"
    system_prompt = ""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.tools: Sequence[Tool] = AttackEnv(sandbox).tools

    def size(self, split: str) -> int:
        return len(ATTACKS)

    def make(self) -> AttackEnv:
        return AttackEnv(self._sandbox)


def scripted(chat: Chat) -> ScriptedEngine:
    """The attack, then the honest program, then an answer."""
    spoken: dict[int, Iterator[str]] = {}

    def script(attack: Attack) -> Iterator[str]:
        yield tool_call_message("", "code_interpreter", {"code": attack.code})
        yield tool_call_message("", "code_interpreter", {"code": HONEST})
        yield "done"

    return ScriptedEngine(
        lambda request: chat.message(next(spoken.setdefault(request.uid, script(ATTACKS[request.uid]))))
    )


def test_every_trajectory_ends_with_a_status():
    sandbox = BubblewrapSandbox(2, LIMITS, [])
    tasks = AttackTasks(sandbox)
    chat = Chat(train_tokenizer([HONEST], 300), [tool_schema(tool) for tool in tasks.tools])
    collector = Collector(tasks, scripted(chat), chat, EPISODE_LIMITS, max_concurrent=64, seed=0)
    try:
        taken = [Task("attacks", "train", index, seed=0) for index in range(len(ATTACKS))]
        collection = collector.collect(taken, 1, tag="train/0")
    finally:
        collector.close()
        sandbox.close()
    for attack, group in zip(ATTACKS, collection.groups, strict=True):
        trajectory = group.trajectories[0]
        assert (trajectory.status, trajectory.success) == (Status.OK, True), (attack.name, trajectory.error)
        assert (trajectory.num_tool_calls, trajectory.num_valid_tool_calls) == (2, 2), attack.name
        contents = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
        assert re.search(attack.reads, contents[0]), (attack.name, contents[0][-300:])
        assert contents[1] == HONEST_OUTPUT.strip(), attack.name
        given = [token for token, own in zip(trajectory.tokens, trajectory.action_mask, strict=True) if not own]
        ends = chat.prompt(trajectory.messages[:1]).count(chat.end_of_turn) + 2
        assert given.count(chat.end_of_turn) == ends, f"{attack.name}: output must not end a message"


def test_nothing_of_a_closed_sandbox_runs_on():
    sandbox = BubblewrapSandbox(1, LIMITS, [])
    assert run(sandbox, "print(1)").stdout == "1\n"
    process = sandbox._idle[0]._process.pid
    children = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    assert children
    sandbox.close()
    for _ in range(1000):
        if not any(Path(f"/proc/{pid}").exists() for pid in [process, *children]):
            break
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in [process, *children])
    assert run(sandbox, "print(1)").status == "SandboxError"
