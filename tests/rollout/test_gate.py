"""The gate: whoever comes to it while it is shut, from either side, waits and does not count as being at large."""

from __future__ import annotations

import asyncio

import pytest

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.gate import Gate
from spear_fast.rollout.scripted_engine import ScriptedEngine

REQUEST = GenerationRequest(uid=0, prompt=[1], max_tokens=4, temperature=1.0, stop_ids=(2,), seed=0)


class Engine(ScriptedEngine):
    """Answers, or fails, when `answer` is set."""

    def __init__(self, error: EngineError | None = None) -> None:
        super().__init__(lambda _: [5, 2])
        self.answer, self.error, self.asked = asyncio.Event(), error, 0

    async def generate(self, request):
        self.asked += 1
        await self.answer.wait()
        if self.error:
            raise self.error
        return await super().generate(request)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def life(gate: Gate, log: list[str]) -> None:
    async with gate.outing():
        log.append("out")
        try:
            log.append(str((await gate.generate(REQUEST)).tokens))
        except EngineError as error:
            log.append(str(error))


@pytest.mark.parametrize(("error", "heard"), [(None, "[5, 2]"), (EngineError("gone"), "gone")])
def test_what_the_engine_says_to_a_shut_gate_is_heard_when_it_opens(error, heard):
    async def main() -> None:
        gate, log = Gate(engine := Engine(error)), []
        task = asyncio.create_task(life(gate, log))
        await settled()
        gate.shut()
        await asyncio.wait_for(gate.nobody_at_large(), 5)
        engine.answer.set()
        await settled()
        assert log == ["out"]
        await asyncio.wait_for(gate.nobody_at_large(), 5)
        gate.open()
        await asyncio.wait_for(task, 5)
        assert log == ["out", heard]

    asyncio.run(main())


def test_nobody_starts_or_asks_while_it_is_shut():
    async def main() -> None:
        gate, log, errand = Gate(engine := Engine()), [], asyncio.Event()
        engine.answer.set()

        async def walker() -> None:
            async with gate.outing():
                await errand.wait()
                await gate.generate(REQUEST)

        walking = asyncio.create_task(walker())
        await settled()
        gate.shut()
        late = asyncio.create_task(life(gate, log))
        still = asyncio.create_task(gate.nobody_at_large())
        await settled()
        assert not still.done(), "the walker is at large"
        errand.set()
        await asyncio.wait_for(still, 5)
        assert log == [] and engine.asked == 0
        gate.open()
        gate.shut()  # before those who wait could run
        await settled()
        assert log == [] and engine.asked == 0
        gate.open()
        await asyncio.wait_for(asyncio.gather(walking, late), 5)
        assert log == ["out", "[5, 2]"] and engine.asked == 2

    asyncio.run(main())
