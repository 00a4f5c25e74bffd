"""What the nodes of one tree share: the engine, the settings, the budget, and work in flight."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..budget import TokenBudget, TokenBudgetExceeded
from ..chat import Reply, Usage
from .engine import Engine, EngineAnswer, EngineCall
from .errors import CheckpointGoneError, EngineCallError, IncompleteAnswerError, PromptTooLongError
from .frame import Message, Piece
from .program import CLOSING_TOKENS, Plan
from .shared_work import SharedWork


@dataclass(frozen=True)
class EngineSettings:
    """How replies are made.

    turn_tokens, query_tokens: the longest turn of a run, and the longest answer of a plain query.
    min_tokens: of replies that need match nothing.
    constrained: turns are prose followed by one block or one final answer.
    tree_tokens: the token budget of one tree; None for none.
    sampling: `temperature`, `top_p`, `seed` and their like.
    """

    turn_tokens: int
    query_tokens: int
    min_tokens: int
    constrained: bool
    tree_tokens: int | None
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Prefix:
    """A text that calls go on from: its messages, its tokens, and the checkpoint that has their KV.

    Without a checkpoint, or when the engine has forgotten it, the tokens are sent.
    """

    tokens: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    checkpoint: str | None = None


@dataclass(frozen=True)
class Shape:
    """What a reply may be: `shape` and `pattern` of a `Plan`."""

    kind: str
    pattern: Any = None


class Tree:
    """One tree of runs on one engine."""

    def __init__(self, engine: Engine, settings: EngineSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.budget = TokenBudget(settings.tree_tokens)
        self.name = f"rlm-{uuid.uuid4().hex}"
        self.in_flight: SharedWork[tuple[Reply, EngineAnswer]] = SharedWork()
        self.documents: SharedWork[tuple[Prefix, int]] = SharedWork(keep=True)
        self._numbers = itertools.count(1)
        self._has_names = False
        self._dropping: set[asyncio.Task[None]] = set()

    def new_name(self) -> str:
        """A name for a checkpoint of this tree, which nobody can guess."""
        self._has_names = True
        return f"{self.name}/{next(self._numbers)}"

    async def start_of(self, messages: Sequence[Message]) -> tuple[Prefix, list[Piece]]:
        """A conversation from its beginning: the frame's head, and what follows it."""
        frame = await self.engine.frame()
        head = await self.engine.token_ids(frame.head(messages))
        return Prefix(head), frame.pieces(messages)

    async def call(
        self,
        prefix: Prefix,
        pieces: list[Piece],
        shape: Shape,
        max_tokens: int,
        *,
        sampling: dict[str, Any] | None = None,
        model: str | None = None,
        keep_as: str | None = None,
        drop: str | None = None,
    ) -> tuple[Reply, EngineAnswer]:
        """Write `pieces` behind `prefix` and generate; the reply with its usage, and the whole answer.

        With `keep_as` the engine keeps the branch under that name; `drop` is one that it may forget.

        Raises:
            PromptTooLongError: nothing was computed.
            TokenBudgetExceeded: nothing was computed, or the reply was cut short.
            IncompleteAnswerError: a reply that had to match a pattern was cut short.
            EngineCallError: the engine refused the call, or failed.
        """
        least = min(self.settings.min_tokens, max_tokens) if shape.kind == "text" else 0
        # The engine has, and was paid for, the tokens of a prefix with a checkpoint.
        counted = 0 if prefix.checkpoint else len(prefix.tokens)
        most = counted + sum(len(text.encode()) for text, _ in pieces) + max_tokens + CLOSING_TOKENS
        async with self.budget.reserve(most) as grant:
            plan = Plan(
                pieces,
                shape.kind,
                shape.pattern,
                max_tokens,
                least,
                self.engine.context,
                grant.tokens,
                counted,
            )
            all_sampling = tuple(sorted({**self.settings.sampling, **(sampling or {})}.items()))
            call = EngineCall(plan, (), all_sampling, keep_as, None, drop, model)
            answer = await self._send(call, prefix)
            grant.spent = answer.outcome.spent
        return self._checked(answer, plan), answer

    async def _send(self, call: EngineCall, prefix: Prefix) -> EngineAnswer:
        if prefix.checkpoint is not None:
            try:
                return await self.engine.send(replace(call, from_checkpoint=prefix.checkpoint))
            except CheckpointGoneError:
                pass  # The tokens themselves do as well, they only have to be computed again.
        return await self.engine.send(replace(call, prompt=prefix.tokens))

    def _checked(self, answer: EngineAnswer, plan: Plan) -> Reply:
        outcome = answer.outcome
        if outcome.reason == "too long":
            raise PromptTooLongError(
                f"a prompt of {outcome.prompt_tokens} tokens leaves no room for a reply in the model's "
                f"context of {self.engine.context}; split the text and ask about the pieces"
            )
        if outcome.reason == "bad pattern":
            raise EngineCallError(f"the answer cannot be constrained: {answer.text}")
        if outcome.reason in ("no budget", "budget"):
            raise TokenBudgetExceeded(f"the token budget of {self.budget.limit} is spent")
        if outcome.reason == "length" and plan.shape in ("regex", "json"):
            raise IncompleteAnswerError(
                f"the answer was not complete after {outcome.reply_tokens} tokens; pass a larger max_tokens"
            )
        cached = max(0, outcome.prompt_tokens - answer.prefilled)
        return Reply(answer.text, Usage(outcome.prompt_tokens, cached, outcome.reply_tokens))

    async def document(self, text: str) -> tuple[Prefix, int]:
        """The beginning of a query about `text`, computed once for the whole tree.

        With it, how many tokens were computed for it now: 0 for all calls but the first.
        """
        (prefix, prefilled), started = await self.documents.run(text, lambda: self._prefill(text))
        return prefix, prefilled if started else 0

    async def _prefill(self, text: str) -> tuple[Prefix, int]:
        start, pieces = await self.start_of([{"role": "user", "content": text}])
        name = self.new_name()
        # Without the last piece, which begins the reply: the question comes first.
        _, answer = await self.call(start, pieces[:-1], Shape("prefill"), 1, keep_as=name)
        return Prefix((*start.tokens, *answer.added), checkpoint=f"{name}/0"), answer.prefilled

    def forget(self, name: str) -> None:
        """Have the engine drop checkpoints, without waiting for it."""
        task = asyncio.create_task(self._drop(name))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def aclose(self) -> None:
        """Have the engine drop every checkpoint of the tree, and wait until it has."""
        await asyncio.gather(*self._dropping)
        if self._has_names:
            await self._drop(self.name)

    async def _drop(self, name: str) -> None:
        plan = Plan([], "nothing", context=self.engine.context)
        await self.engine.send(EngineCall(plan, drop=name))
