"""The backend whose calls run inside an engine, where the KV cache is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..async_backends import AsyncChildRLMBackend
from ..backends import TOO_MANY_CHILDREN, _ChildCall
from ..chat import Reply, Usage
from ..prompts import LAST_CHANCE, build_forked_prompt
from .errors import EngineCallError
from .frame import Message, Piece
from .tree import Prefix, Shape, Tree

BEFORE_QUESTION = "\n\n"
"""Between a shared text and the question about it."""


class EngineBackend(AsyncChildRLMBackend):
    """The queries of one run, on an engine; `LocalRLMRunner(EngineChat(...))` makes them.

    The run's conversation stays in the engine: a turn goes on from the tokens of the one before, and only
    what is new is sent and computed. A batch is one task per query; the engine decides how many run.

    Besides `model`, `llm_query` and `llm_query_batched` take these keywords:

    - `shared=text`: the prompt is a question about `text`, which is computed once for the whole tree;
    - `fork=True`: go on from this run's own conversation, sharing its KV;
    - `regex=` or `schema=`: what the answer must match;
    - `max_tokens=`, `temperature=`, and `timeout_s=` of every single answer.

    `rlm_query(..., fork=True)` starts a child that goes on from this run's conversation, with the same
    `context`; it takes `timeout_s=` too, and where depth allows no children all keywords of `llm_query`.
    """

    def __init__(
        self,
        llm_chat_fn: Any,
        *,
        tree: Tree | None = None,
        conversation: Prefix | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(llm_chat_fn, **kwargs)
        self.tree: Tree = llm_chat_fn.new_tree() if tree is None else tree
        self.is_root = tree is None
        self.messages: list[Message] = []
        self.context = ""
        self._conversation = conversation
        self._checkpoint: str | None = None
        """The run's own one; that of a forked run's parent is not its to drop."""

    # The run's turns

    async def turn(self, messages: list[Message], model: str | None = None) -> Reply:
        """The reply to a conversation, token by token after the last turn where it goes on from it."""
        prefix, pieces = await self._prefix_of(messages)
        old, new = self._checkpoint, self.tree.new_name()
        reply, answer = await self.tree.call(
            prefix,
            pieces,
            self._turn_shape(messages),
            self.tree.settings.turn_tokens,
            model=model,
            keep_as=new,
            drop=old,
        )
        seen = (*messages, {"role": "assistant", "content": str(reply)})
        self._conversation = Prefix((*prefix.tokens, *answer.added), seen, f"{new}/0")
        self._checkpoint = new
        return reply

    async def aclose(self) -> None:
        """The run is over: the engine may forget its conversation, and at the root everything."""
        if self.is_root:
            await self.tree.aclose()
        elif self._checkpoint is not None:
            self.tree.forget(self._checkpoint)

    def _turn_shape(self, messages: Sequence[Message]) -> Shape:
        if not self.tree.settings.constrained:
            return Shape("text")
        if messages[-1]["content"] == LAST_CHANCE:
            return Shape("final")
        return Shape("strict turn" if self.strict else "turn")

    async def _prefix_of(self, messages: Sequence[Message]) -> tuple[Prefix, list[Piece]]:
        """What of a conversation the engine knows, and what is to be written behind it."""
        if self._conversation is not None:
            frame = await self.tree.engine.frame()
            pieces = frame.continuation(self._conversation.messages, messages)
            if pieces is not None:
                return self._conversation, pieces
        return await self.tree.start_of(messages)

    # Queries

    async def query(  # type: ignore[override]
        self, prompt: str, model: str | None = None, *, timeout_s: float | None = None, **options: Any
    ) -> str:
        node = self._node("query", self.depth, prompt, model)
        try:
            async with asyncio.timeout(timeout_s) as clock:
                answer = await self._ask(prompt, model, **options)
        except BaseException as error:
            if isinstance(error, TimeoutError) and clock.expired():
                error = TimeoutError(f"no answer within {timeout_s} s")
            node.finish(error=str(error) or type(error).__name__)
            raise error
        return self._answered(node, answer)

    async def query_batched(  # type: ignore[override]
        self, prompts: list[str], model: str | None = None, **options: Any
    ) -> list[str]:
        return await self._gather(partial(self.query, **options), prompts, model)

    async def _ask(
        self,
        prompt: str,
        model: str | None,
        *,
        shared: str | None = None,
        fork: bool = False,
        regex: str | None = None,
        schema: Any = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Reply:
        tree = self.tree
        shape = _shape_of(regex, schema)
        sampling = {} if temperature is None else {"temperature": float(temperature)}
        prefix, pieces, computed = await self._start_of_query(prompt, shared, fork)
        limit = tree.settings.query_tokens if max_tokens is None else int(max_tokens)
        call = partial(tree.call, prefix, pieces, shape, limit, sampling=sampling, model=model)
        if {"temperature": 1.0, **tree.settings.sampling, **sampling}["temperature"] != 0:
            reply, started = (await call())[0], True
        else:
            pattern = json.dumps(shape.pattern)
            key = (prefix.checkpoint or prefix.tokens, tuple(pieces), shape.kind, pattern, limit, model)
            (reply, _), started = await tree.in_flight.run(key, call)
        if not started:
            return Reply(str(reply), Usage(computed))
        usage = reply.usage or Usage()
        # The prefill takes its last token back, and that one is computed twice.
        return Reply(str(reply), replace(usage, cached_tokens=max(0, usage.cached_tokens - computed)))

    async def _start_of_query(
        self, prompt: str, shared: str | None, fork: bool
    ) -> tuple[Prefix, list[Piece], int]:
        """What a query goes on from, what it writes, and tokens of a shared text computed for it."""
        question: Message = {"role": "user", "content": prompt}
        if shared is not None and fork:
            raise ValueError("shared= and fork=True exclude each other: put the text into the prompt")
        if fork:
            self._must_have_begun()
            return *await self._prefix_of([*self.messages, question]), 0
        prefix, pieces = await self.tree.start_of([question])
        if shared is None:
            return prefix, pieces, 0
        prefix, computed = await self.tree.document(str(shared))
        return prefix, [(BEFORE_QUESTION, False), *pieces], computed

    def _must_have_begun(self) -> None:
        if self._conversation is None:
            raise EngineCallError("fork=True needs a conversation to go on from, and this run has none yet")

    # Children

    async def recursive_query(  # type: ignore[override]
        self,
        prompt: str,
        model: str | None = None,
        *,
        fork: bool = False,
        timeout_s: float | None = None,
        **options: Any,
    ) -> str:
        if self.depth + 1 >= self.max_depth:
            return await self.query(prompt, model, fork=fork, timeout_s=timeout_s, **options)
        if options:
            raise TypeError(f"rlm_query takes fork= and timeout_s=, not {', '.join(options)}")
        if fork:
            self._must_have_begun()
        if not self.limits.admit_child():
            return TOO_MANY_CHILDREN
        async with self._gate():
            with _ChildCall(self, prompt, model) as call:
                child = self._make_child(call)
                if fork:
                    child.backend_factory = partial(
                        self._child_backend_factory, conversation=self._conversation
                    )
                    child.opening = [*self.messages, build_forked_prompt(prompt)]
                limits = [limit for limit in (timeout_s, call.timeout_s) if limit is not None]
                result = await child.arun(
                    self.context if fork else prompt,
                    prompt,
                    model=model,
                    timeout_s=min(limits, default=None),
                )
                return call.finished(result)

    async def recursive_query_batched(  # type: ignore[override]
        self, prompts: list[str], model: str | None = None, **options: Any
    ) -> list[str]:
        kept = self._capped(prompts)
        answers = await self._gather(partial(self.recursive_query, **options), kept, model)
        return answers + self._refused(prompts, kept)

    def _child_arguments(self, *, conversation: Prefix | None = None, **kwargs: Any) -> dict[str, Any]:
        shared = {"tree": self.tree, "conversation": conversation}
        return {**super()._child_arguments(**kwargs), **shared}


def _shape_of(regex: str | None, schema: Any) -> Shape:
    if regex is not None and schema is not None:
        raise ValueError("regex= and schema= exclude each other")
    if schema is not None:
        return Shape("json", schema)
    return Shape("text") if regex is None else Shape("regex", regex)
