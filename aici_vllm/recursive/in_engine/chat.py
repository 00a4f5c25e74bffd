"""The chat function that brings the engine backend: what a runner is given to run inside an engine."""

from __future__ import annotations

from typing import Any

from ..chat import Message, Reply
from .backend import EngineBackend
from .engine import Engine
from .local_engine import AsyncLLMEngine, LLMEngine
from .tree import EngineSettings, Shape, Tree


class EngineChat:
    """`LocalRLMRunner(EngineChat(engine)).arun(context, task)` runs a tree inside an engine.

    engine: a `vllm.LLM` or an `AsyncLLM` made with `**aici_vllm.engine_args()`, or a `ServerEngine`.
    turn_tokens, query_tokens: the longest turn of a run, and the longest answer of a plain query.
    constrained: turns are prose and then one fenced block or one final answer, so none is malformed.
    tree_tokens: a budget for all calls of a tree, prompts and replies; a prompt that goes on from tokens the
        engine has costs only what is new. Once it is spent, runs end with `Error: the token budget ...`.
    sampling: `temperature` (0 unless given), `top_p`, `seed` and their like.

    Called like any chat function it makes one plain call. It is used in one event loop.
    """

    backend_kind = EngineBackend
    """What a runner makes its backends with."""

    def __init__(
        self,
        engine: Any,
        *,
        turn_tokens: int = 1024,
        query_tokens: int = 512,
        min_tokens: int = 0,
        constrained: bool = True,
        tree_tokens: int | None = None,
        **sampling: Any,
    ) -> None:
        self.engine = _engine(engine)
        self.settings = EngineSettings(
            turn_tokens, query_tokens, min_tokens, constrained, tree_tokens, {"temperature": 0.0, **sampling}
        )

    async def __call__(self, messages: list[Message], model: str | None = None) -> Reply:
        tree = self.new_tree()
        prefix, pieces = await tree.start_of(messages)
        reply, _ = await tree.call(prefix, pieces, Shape("text"), self.settings.query_tokens, model=model)
        return reply

    def new_tree(self) -> Tree:
        """What a root's backend and those below it share."""
        return Tree(self.engine, self.settings)


def _engine(engine: Any) -> Engine:
    if hasattr(engine, "llm_engine"):
        return LLMEngine(engine)
    if hasattr(engine, "renderer") and hasattr(engine, "generate"):
        return AsyncLLMEngine(engine)
    if hasattr(engine, "send") and hasattr(engine, "frame"):
        found: Engine = engine
        return found
    raise TypeError(
        f"EngineChat takes a vllm.LLM, an AsyncLLM or a ServerEngine, not {type(engine).__name__}"
    )
