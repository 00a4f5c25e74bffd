"""What a program can wait for: the whole vocabulary between a script and its branch.

A program, native or sandboxed, runs until it awaits one of these. The branch turns it into a
decision for the engine and resumes the program with the result.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from constraints import Constraint

if TYPE_CHECKING:
    from aici_vllm.controller.decisions import MidProcessResult


class Awaitable:
    """Makes `await x` hand `x` itself to the driver of the coroutine."""

    __slots__ = ()

    def __await__(self) -> Generator["Awaitable", Any, Any]:
        return (yield self)


@dataclass(slots=True)
class FixedText(Awaitable):
    """Append `tokens`, after taking back everything since the mark `following`.

    Result: the tokens.
    """

    tokens: list[int]
    following: int | None = None


@dataclass(slots=True)
class Generate(Awaitable):
    """Sample up to `max_tokens` tokens under `constraint`.

    Ends at EOS, when the constraint forces the end, when the text holds `stop_at`, or at
    `max_tokens`. Result: the list of tokens, EOS included. `shared` says that the script made
    `constraint` and may use it again.
    """

    constraint: Constraint
    max_tokens: int
    min_tokens: int = 0
    stop_at: bytes | None = None
    store_var: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    shared: bool = False


@dataclass(slots=True)
class Decide(Awaitable):
    """Do what a user's `NextToken` decided: sample under a mask, splice, fork, or stop.

    Result: a `Decided`, in every branch that follows. `own` says that no script holds a part of it, and
    that every part was checked.
    """

    result: "MidProcessResult"
    own: bool = False


class Decided(NamedTuple):
    """What came of a `Decide`: which branch this is, how many tokens it lost and which it got."""

    branch: int
    backtrack: int
    tokens: list[int]


@dataclass(slots=True)
class WaitVars(Awaitable):
    """Sleep until all `names` are set. Result: their values, in order."""

    names: tuple[str, ...]


@dataclass(slots=True)
class GetPrompt(Awaitable):
    """Result: the prompt's tokens. Only the first await of a program may be this one."""


@dataclass(slots=True)
class Stop(Awaitable):
    """End the branch. The program is never resumed."""
