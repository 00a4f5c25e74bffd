"""The token budget of a tree: calls reserve the most they may need, and pay what they used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class TokenBudgetExceeded(RuntimeError):
    """The token budget of the tree is spent."""


@dataclass
class Grant:
    """What a call may spend, None for any number, and what it has spent.

    A call that ends without saying so, because it was aborted, is charged all it was granted.
    """

    tokens: int | None
    spent: int | None = None


class TokenBudget:
    """Tokens that the calls of a tree may add to the engine's sequences, prompts and replies together.

    `limit` is None for a budget that only counts. A call waits while others in flight hold what it needs;
    once it is alone it gets what is left. So nothing is refused that fits, and no more than `limit` is
    ever spent. All calls live in one event loop.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"a token budget must be 1 or more, not {limit}; use None for no budget")
        self.limit = limit
        self.spent = 0
        self._reserved = 0
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def reserve(self, tokens: int) -> AsyncIterator[Grant]:
        """Hold up to `tokens` until the block ends.

        Raises:
            TokenBudgetExceeded: the budget is spent.
        """
        grant = Grant(await self._take(tokens))
        try:
            yield grant
        finally:
            self._reserved -= grant.tokens or 0
            self.spent += (grant.tokens or 0) if grant.spent is None else grant.spent
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    async def _take(self, tokens: int) -> int | None:
        if self.limit is None:
            return None
        while self._reserved and self.limit - self.spent - self._reserved < tokens:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        granted = min(tokens, self.limit - self.spent - self._reserved)
        if granted < 1:
            raise TokenBudgetExceeded(f"the token budget of {self.limit} is spent")
        self._reserved += granted
        return granted
