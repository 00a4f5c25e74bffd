"""Conditions that can be checked on the beginning of a reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from aici_vllm.agents.calls import AICall


@runtime_checkable
class PrefixCondition(Protocol):
    """A condition of `airetry` that can also tell from the beginning of a reply that it must fail.

    `may_still_pass(text)` gets the reply so far. It may return False only if the condition fails for `text`
    as a whole reply and for every reply that begins with it: the engine then ends the sample there. When in
    doubt, True. It is pickled into the engine's process and asked after each token while the batch waits, so
    it must be quick and need nothing from this process.
    """

    def __call__(self, call: AICall) -> bool:
        """Whether the call's last reply passes."""
        ...

    def may_still_pass(self, text: str) -> bool:
        """Whether a reply that begins with `text` can pass."""
        ...


@dataclass(frozen=True)
class PrefixChecked:
    """A `PrefixCondition` made of two functions: the condition, and the check on the beginning of a reply."""

    condition: Callable[[AICall], Any]
    may_still_pass: Callable[[str], bool]

    def __call__(self, call: AICall) -> Any:
        return self.condition(call)


def prefix_check(condition: Any) -> Callable[[str], bool] | None:
    """The condition's check on a prefix, None when it has none."""
    return getattr(condition, "may_still_pass", None)
