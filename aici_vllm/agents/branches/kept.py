"""What an engine keeps of a search: checkpoints of its replies, until no sample is left to go on from."""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aici_vllm.agents.messages import AIMessage, Message

_over: weakref.WeakKeyDictionary[Any, deque[str]] = weakref.WeakKeyDictionary()


def names_over(engine: Any) -> deque[str]:
    """Names of searches whose checkpoints this engine may forget; take one, and tell the engine."""
    return _over.setdefault(engine, deque())


class Search:
    """The checkpoints of one tree of samples in one engine, under a name that nobody can guess.

    The replies of the tree hold it. Once the last of them is gone, its name is among `names_over`.
    """

    def __init__(self, engine: Any) -> None:
        self.name = f"agents-{secrets.token_hex(16)}"
        self.is_over = False
        self._engine = weakref.ref(engine)
        self._numbers = itertools.count(1)
        self._finalizer = weakref.finalize(self, names_over(engine).append, self.name)
        self._finalizer.atexit = False

    def next_name(self) -> str:
        """A name for the branches of one more request."""
        return f"{self.name}/{next(self._numbers)}"

    def goes_on_in(self, engine: Any) -> bool:
        """Whether `engine` may still have the checkpoints."""
        return not self.is_over and self._engine() is engine

    def end(self) -> None:
        """The engine has been told to forget all of it."""
        self.is_over = True
        self._finalizer.detach()


@dataclass(eq=False)
class Kept:
    """The sequence of a reply in an engine: checkpoint `name`; `gone` once the engine has said so."""

    search: Search
    name: str
    gone: bool = False

    def is_in(self, engine: Any) -> bool:
        """Whether it is worth asking `engine` for it."""
        return not self.gone and self.search.goes_on_in(engine)


def search_of(conversation: Sequence[Message], engine: Any) -> Search:
    """The search that a conversation belongs to: that of its last reply in this engine, else a new one."""
    for message in reversed(conversation):
        kept = message.sequence.kept if isinstance(message, AIMessage) and message.sequence else None
        if kept is not None and kept.search.goes_on_in(engine):
            return kept.search
    return Search(engine)
