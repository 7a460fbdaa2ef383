"""Tools of many trajectories: who may run beside whom, limits of calls at once, and threads that hang on."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from spear_fast.envs import threads
from spear_fast.envs.threads import Threads, threads_left
from spear_fast.errors import TaskError
from spear_fast.rollout import tool_runner
from spear_fast.rollout.timeouts import within
from spear_fast.rollout.tool_calls import ToolCall
from spear_fast.rollout.tool_runner import ToolRunner, ToolTimeoutError
from tests.rollout.test_episode import LIMITS


def runner(**changes) -> ToolRunner:
    return replace(LIMITS, **changes).tool_runner()


class Meter:
    """Counts calls that run at once, from any thread."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.log: list[str] = []
        self.lock = threading.Lock()

    def enter(self, name: str = "") -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.log.append(f"+{name}")

    def leave(self, name: str = "") -> None:
        with self.lock:
            self.now -= 1
            self.log.append(f"-{name}")


def tools_of(meter: Meter, together: int = 1):
    """A sync and an async tool and an async method; the sync one waits until `together` calls are at work."""
    met = threading.Barrier(together)

    def slow(name: str) -> str:
        """Wait for company.

        Args:
            name: Of the call.
        """
        meter.enter(name)
        met.wait(10)
        meter.leave(name)
        return name

    async def free(name: str) -> str:
        """Yield.

        Args:
            name: Of the call.
        """
        meter.enter(name)
        for _ in range(3):
            await asyncio.sleep(0)
        meter.leave(name)
        return name

    class Page:
        async def click(self, name: str) -> str:
            """Change the page.

            Args:
                name: Of the call.
            """
            return await free(name)

    return [slow, free, Page().click]


def calls(text: str) -> list[ToolCall]:
    return [ToolCall(*pair) for name in text.split() for pair in [(name.split(":")[0], {"name": name.split(":")[1]})]]


def test_results_keep_their_order_and_only_free_async_tools_overlap():
    def log(text: str) -> tuple[list[str], str]:
        meter = Meter()
        results = asyncio.run(runner().run(calls(text), tools_of(meter)))
        return [result.text for result in results], " ".join(meter.log)

    assert log("free:a free:b") == (["a", "b"], "+a +b -a -b")
    assert log("click:a click:b") == (["a", "b"], "+a -a +b -b")
    assert log("slow:a slow:b") == (["a", "b"], "+a -a +b -b")
    assert log("free:a free:b slow:c free:d") == (["a", "b", "c", "d"], "+a +b -a -b +c -c +d -d")


def test_a_timeout_ends_the_calls_beside_it():
    ended = []

    async def wait(name: str) -> str:
        """Wait.

        Args:
            name: Of the call.
        """
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(name)
        return name

    async def brief(name: str) -> str:
        """Wait as well.

        Args:
            name: Of the call.
        """
        return await wait(name)

    async def main() -> None:
        with pytest.raises(ToolTimeoutError, match="'brief'"):
            await runner(tool_timeouts_s={"brief": 0.02}).run(calls("brief:a wait:b"), [brief, wait])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sorted(ended) == ["a", "b"]

    asyncio.run(main())


def test_sync_tools_of_different_trajectories_run_beside_each_other():
    meter = Meter()
    tools = tools_of(meter, together=8)

    async def main() -> None:
        shared = runner()
        await asyncio.gather(*(shared.run(calls(f"slow:{k}"), tools) for k in range(8)))

    asyncio.run(main())
    assert meter.most == 8


@pytest.mark.parametrize("name", ["slow", "free"])
def test_the_calls_of_a_tool_at_once_are_bounded_by_name(name):
    meter = Meter()
    tools = tools_of(meter)

    async def main() -> None:
        shared = runner(tool_concurrency={name: 2})
        await asyncio.gather(*(shared.run(calls(f"{name}:{k}"), tools) for k in range(10)))

    asyncio.run(main())
    assert meter.most <= 2 and len(meter.log) == 20
    if name == "free":
        assert meter.most == 2


def test_threads_are_bounded_and_waiting_for_one_is_not_running_late(monkeypatch):
    monkeypatch.setattr(tool_runner, "MAX_THREADS", 1)
    meter, release = Meter(), threading.Event()

    def work(name: str) -> str:
        """Work.

        Args:
            name: Of the call.
        """
        meter.enter()
        release.wait(0.4)
        meter.leave()
        return name

    async def main() -> list:
        shared = runner(tool_timeout_s=1.5)
        return await asyncio.gather(*(shared.run(calls(f"work:{k}"), [work]) for k in range(5)))

    # The last one waits longer than it may run.
    results = asyncio.run(main())
    assert [result.text for (result,) in results] == list("01234") and meter.most == 1


def test_a_thread_that_outlives_its_limit_gives_its_place_back_and_is_counted(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(threads, "MOST_LEFT", 2)

    async def main() -> None:
        pool = Threads(1)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await within(pool.run(release.wait), 0.02)
        await asyncio.sleep(0)  # the cancellation arrives
        assert threads_left() == 2
        with pytest.raises(TaskError, match="threads of tools or rewards that timed out still run"):
            await within(pool.run(release.wait), 5.0)
        release.set()
        for _ in range(500):
            if not threads_left():
                break
            await asyncio.sleep(0.01)
        assert threads_left() == 0
        assert await within(pool.run(lambda: "fine"), 5.0) == ("fine", None)

    asyncio.run(main())


def test_a_pool_serves_one_event_loop_after_another():
    pool = Threads(1)

    async def main() -> list:
        return await asyncio.gather(*(pool.run(lambda: 1) for _ in range(3)))

    assert asyncio.run(main()) == asyncio.run(main()) == [(1, None)] * 3
