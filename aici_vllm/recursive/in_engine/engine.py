"""A vLLM with this plugin, as calls see it: one interface, wherever the engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointGoneError, EngineCallError
from .frame import ChatFrame
from .program import OUTCOME, REPLY, Outcome, Plan

if TYPE_CHECKING:
    from aici_vllm.offline import BranchResult, ControllerResult


@dataclass(frozen=True)
class EngineCall:
    """One request to the engine.

    prompt: token ids; () with `from_checkpoint`, whose branch then is the prompt.
    sampling: `temperature`, `top_p`, `seed` and their like.
    checkpoint: the name to keep the branch under; `drop` is one that the engine may forget.
    model: the name of a served model; an engine in this process has one model and ignores it.
    """

    plan: Plan
    prompt: tuple[int, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()
    checkpoint: str | None = None
    from_checkpoint: str | None = None
    drop: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class EngineAnswer:
    """What came of a call.

    added: the tokens behind the call's prompt.
    prefilled: tokens of the whole prompt that the engine computed; the rest had its KV already.
    """

    text: str
    outcome: Outcome
    added: tuple[int, ...]
    prefilled: int


class Engine(Protocol):
    """Where calls run. Cancelling `send` aborts the generation."""

    context: int
    """Tokens of the model's context; known once `frame` was awaited."""

    async def frame(self) -> ChatFrame:
        """The frame of the model's chat template."""
        ...

    async def token_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a head of the frame; there are two heads, so they are remembered."""
        ...

    async def send(self, call: EngineCall) -> EngineAnswer:
        """Run one call.

        Raises:
            CheckpointGoneError: `from_checkpoint` names nothing that the engine still has.
            EngineCallError: it was refused or failed.
        """
        ...

    async def aclose(self) -> None:
        """Let go of what the engine is reached with."""
        ...


def answer_of(result: ControllerResult) -> EngineAnswer:
    """The answer in the results of a finished request."""
    branch = result.branches[0]
    if branch.error is not None:
        if "there is no checkpoint" in branch.error:
            raise CheckpointGoneError(branch.error)
        raise EngineCallError(f"the call failed in the engine: {branch.error}")
    if OUTCOME not in result.variables:
        raise EngineCallError(f"the call ended in the engine before its reply ({branch.finish_reason})")
    outcome = Outcome.from_json(result.variables[OUTCOME])
    computed = result.usage.computed_tokens - result.usage.discarded_rows
    return EngineAnswer(
        result.variables[REPLY].decode("utf-8", "replace"),
        outcome,
        tuple(branch.token_ids),
        max(0, computed - max(0, _decoded(branch, outcome) - 1)),
    )


def _decoded(branch: BranchResult, outcome: Outcome) -> int:
    """Tokens of the reply up to the last sampled one. The last is not computed, nor is what follows."""
    ends = list(accumulate(count for _, count in branch.sources))
    sampled = [end for end, (source, _) in zip(ends, branch.sources, strict=True) if source == "sampled"]
    return max(sampled, default=0) - (len(branch.token_ids) - outcome.reply_tokens)
