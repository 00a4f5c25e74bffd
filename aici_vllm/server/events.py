"""What the engine says of each step, put into the events of `POST /v1/run`."""

from collections.abc import Callable
from typing import Any

from aici_vllm.server.protocol import Fork, Part, Run, Storage, Usage, WriteVar
from aici_vllm.server.text import BranchText

TAKEN_BACK = " ↩ "
"""What stands in `text` where text was taken back."""

FINISH_REASONS = {"stop": "aici-stop"}
"""Ends whose name differs from ours."""

TokenBytes = Callable[[int], bytes]


class RunEvents:
    """The events of one controlled request.

    Args:
        token_bytes: what a token adds to the text.
    """

    def __init__(self, token_bytes: TokenBytes):
        self._token_bytes = token_bytes
        self._texts: dict[int, BranchText] = {}

    def step(self, event: dict[str, Any]) -> Run:
        """The event of one step."""
        return Run(forks=[self._fork(fork) for fork in event["forks"]], usage=usage(event["usage"]))

    def _fork(self, fork: dict[str, Any]) -> Fork:
        text = self._texts.setdefault(fork["index"], BranchText())
        parts = [self._part(text, kind, tokens) for kind, tokens in fork["changes"]]
        reason: Any = fork.get("finish_reason")
        if reason is not None and (rest := text.finish()):
            parts.append(Part(kind="sampled", text=rest))
        parts = [part for part in parts if part.text]
        return Fork(
            index=fork["index"],
            finish_reason=FINISH_REASONS.get(reason, reason),
            text="".join(TAKEN_BACK if part.kind == "taken_back" else part.text for part in parts),
            parts=parts,
            error=fork.get("error") or "",
            logs=fork["logs"],
            storage=[_write(*write) for write in fork["storage"]],
        )

    def _part(self, text: BranchText, kind: Any, tokens: list[int]) -> Part:
        if kind == "taken_back":
            return Part(kind=kind, text=text.take_back(len(tokens)))
        return Part(kind=kind, text=text.add(map(self._token_bytes, tokens)))


def usage(found: dict[str, int]) -> Usage:
    """The engine's count under the names of this interface."""
    sampled, computed = found["sampled_tokens"], found["computed_tokens"]
    return Usage(
        sampled_tokens=sampled,
        ff_tokens=computed,
        cost=2 * sampled + computed,
        spliced_tokens=found["spliced_tokens"],
        forward_passes=found["forward_passes"],
        discarded_rows=found["discarded_rows"],
    )


def plain_event(text: str, sampled: int, prompt: int, finish_reason: str | None) -> Run:
    """The event of a request without a controller.

    Args:
        text: what is new.
        sampled, prompt: tokens so far, and tokens of the prompt.
        finish_reason: vLLM's.
    """
    reason: Any = "eos" if finish_reason == "stop" else finish_reason
    parts = [Part(kind="sampled", text=text)] if text else []
    computed = prompt + max(sampled - 1, 0)
    cost = Usage(
        sampled_tokens=sampled, ff_tokens=computed, cost=2 * sampled + computed, forward_passes=sampled
    )
    return Run(forks=[Fork(index=0, finish_reason=reason, text=text, parts=parts)], usage=cost)


def _write(name: str, value: bytes, operation: Any) -> Storage:
    return Storage(WriteVar=WriteVar(name=name, value=value.hex(), op=operation))
