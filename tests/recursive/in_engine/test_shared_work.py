"""Work that is wanted several times is done once, and stops when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from aici_vllm.recursive.in_engine.shared_work import SharedWork


class Work:
    """Counts its beginnings and ends; `go` lets it end."""

    def __init__(self) -> None:
        self.begun = self.ended = self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        return self.begun


async def settled(*tasks: asyncio.Task[Any]) -> list[Any]:
    for _ in range(5):
        await asyncio.sleep(0)
    return list(tasks)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_equal_keys_in_flight_are_one() -> None:
    async def go() -> None:
        shared: SharedWork[int] = SharedWork()
        work = Work()
        tasks = [asyncio.create_task(shared.run("a", work)) for _ in range(3)]
        other = asyncio.create_task(shared.run("b", work))
        await settled()
        assert work.begun == 2
        work.go.set()
        assert await asyncio.gather(*tasks) == [(2, True), (2, False), (2, False)]
        assert (await other)[1]
        assert await shared.run("a", work) == (3, True), "what is over is done again"

    run(go())


def test_kept_results_stay_and_failures_do_not() -> None:
    async def go() -> None:
        shared: SharedWork[int] = SharedWork(keep=True)
        work = Work()
        work.go.set()
        assert await shared.run("a", work) == (1, True)
        assert await shared.run("a", work) == (1, False)

        async def fail() -> int:
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            await shared.run("b", fail)
        await settled()
        assert await shared.run("b", work) == (2, True)

    run(go())


def test_the_last_one_to_leave_stops_the_work() -> None:
    async def go() -> None:
        shared: SharedWork[int] = SharedWork()
        work = Work()
        first, second = (asyncio.create_task(shared.run("a", work)) for _ in range(2))
        await settled()
        first.cancel()
        await settled()
        assert first.cancelled() and not work.cancelled
        second.cancel()
        await settled()
        assert second.cancelled() and work.cancelled == 1
        work.go.set()
        assert await shared.run("a", work) == (2, True)

    run(go())
