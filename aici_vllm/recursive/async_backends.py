"""The same backend for an event loop: one task per call, no thread held while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .backends import TOO_MANY_CHILDREN, LocalChildRLMBackend, _ChildCall
from .chat import call_off_loop

LIVE_CHILDREN_PER_DEPTH = 64
"""Child runs of one depth that are alive at once in a tree: each holds a sandbox worker of about 8 MiB."""


class AsyncChildRLMBackend(LocalChildRLMBackend):
    """Coroutine versions of the four queries, for a chat function that is a coroutine function.

    A batch starts all its queries at once; the server behind the chat function decides how many run. Child
    runs wait at a gate per depth, so that a batch of any size keeps the number of sandboxes bounded. A gate
    per depth cannot deadlock: a child only ever waits for children of the next depth.
    """

    async def query(self, prompt: str, model: str | None = None) -> str:  # type: ignore[override]
        node = self._node("query", self.depth, prompt, model)
        try:
            answer = await call_off_loop(self._chat, [{"role": "user", "content": prompt}], model)
        except BaseException as error:
            node.finish(error=str(error) or type(error).__name__)
            raise
        return self._answered(node, answer)

    async def query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:  # type: ignore[override]
        return await self._gather(self.query, prompts, model)

    async def recursive_query(self, prompt: str, model: str | None = None) -> str:  # type: ignore[override]
        if self.depth + 1 >= self.max_depth:
            return await self.query(prompt, model)
        if not self.limits.admit_child():
            return TOO_MANY_CHILDREN
        async with self._gate():
            with _ChildCall(self, prompt, model) as call:
                child = self._make_child(call)
                result = await child.arun(prompt, prompt, model=model, timeout_s=call.timeout_s)
                return call.finished(result)

    async def recursive_query_batched(  # type: ignore[override]
        self, prompts: list[str], model: str | None = None
    ) -> list[str]:
        kept = self._capped(prompts)
        answers = await self._gather(self.recursive_query, kept, model)
        return answers + self._refused(prompts, kept)

    def _gate(self) -> asyncio.Semaphore:
        gates = self.limits._gates
        if self.depth not in gates:
            gates[self.depth] = asyncio.Semaphore(LIVE_CHILDREN_PER_DEPTH)
        return gates[self.depth]

    async def _gather(
        self, query: Callable[..., Awaitable[str]], prompts: Sequence[str], model: str | None
    ) -> list[str]:
        async def one(prompt: str) -> str:
            try:
                return await query(prompt, model)
            except Exception as error:
                return f"Error: {error}"

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))
