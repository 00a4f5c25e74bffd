"""A budget is never overspent, and refuses nothing that fits."""

from __future__ import annotations

import asyncio
import random

import pytest

from aici_vllm.recursive import TokenBudget, TokenBudgetExceeded


def test_any_company_of_calls_stays_within_the_limit() -> None:
    async def go(seed: int) -> None:
        draw = random.Random(seed)
        budget, real = TokenBudget(1000), 0

        async def call() -> None:
            nonlocal real
            wanted = draw.randint(1, 400)
            async with budget.reserve(wanted) as grant:
                assert grant.tokens is not None and 1 <= grant.tokens <= wanted
                for _ in range(draw.randint(0, 5)):
                    await asyncio.sleep(0)
                grant.spent = draw.randint(0, grant.tokens)
                real += grant.spent

        ends = await asyncio.gather(*(call() for _ in range(60)), return_exceptions=True)
        assert real == budget.spent <= 1000
        assert all(end is None or isinstance(end, TokenBudgetExceeded) for end in ends)
        # Only a budget that is really spent refuses.
        assert not any(ends) or budget.spent == 1000

    for seed in range(40):
        asyncio.run(go(seed))


def test_a_call_waits_for_what_others_give_back() -> None:
    async def go() -> list[int]:
        budget, granted = TokenBudget(100), []
        first_holds, go_on = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with budget.reserve(90) as grant:
                first_holds.set()
                await go_on.wait()
                grant.spent = 10

        async def second() -> None:
            await first_holds.wait()
            async with budget.reserve(80) as grant:
                granted.append(grant.tokens or 0)
                grant.spent = 0

        both = asyncio.gather(first(), second())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not granted
        go_on.set()
        await both
        return granted

    assert asyncio.run(go()) == [80]


def test_an_aborted_call_is_charged_what_it_held() -> None:
    async def go() -> None:
        budget = TokenBudget(100)
        with pytest.raises(RuntimeError):
            async with budget.reserve(30):
                raise RuntimeError
        assert budget.spent == 30
        async with budget.reserve(500) as grant:
            assert grant.tokens == 70
        with pytest.raises(TokenBudgetExceeded, match="the token budget of 100 is spent"):
            async with budget.reserve(1):
                pass

    asyncio.run(go())


def test_a_waiter_may_be_cancelled() -> None:
    async def go() -> None:
        budget = TokenBudget(10)
        async with budget.reserve(10) as grant:

            async def wait() -> None:
                async with budget.reserve(5):
                    pass

            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            grant.spent = 4
        async with budget.reserve(6) as rest:
            assert rest.tokens == 6

    asyncio.run(go())


def test_no_limit_only_counts() -> None:
    async def go() -> None:
        budget = TokenBudget()
        async with budget.reserve(10**9) as grant:
            assert grant.tokens is None
            grant.spent = 7
        assert budget.spent == 7

    asyncio.run(go())
    with pytest.raises(ValueError, match="must be 1 or more, not 0"):
        TokenBudget(0)
