"""Constraints made of literal text: `options` and `substring`. Their masks come from a few table look-ups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from constraints.errors import ConstraintError
from constraints.machine import Machine, MachineConstraint, State, compiled
from constraints.token_set import Row, pack
from constraints.vocabulary import Vocabulary


class LiteralMachine(Machine[State]):
    """A machine with few ways on from every state, so that the texts of a token's length can be listed."""

    @abstractmethod
    def edges(self, state: State) -> Iterable[tuple[int, State]]:
        """The bytes that may follow and the states they lead to."""

    def next_bytes(self, state: State) -> bytes:
        return bytes(sorted(byte for byte, _ in self.edges(state)))

    def step(self, state: State, text: bytes) -> State | None:
        found: State | None = state
        for byte in text:
            found = next((after for label, after in self.edges(found) if label == byte), None)
            if found is None:
                return None
        return found

    def text_row(self, state: State, tokens: list[int]) -> Row:
        v = self.vocabulary
        ids: list[int] = []
        open_texts = [(b"", state)]
        while open_texts:
            text, at = open_texts.pop()
            for byte, after in self.edges(at):
                longer = text + bytes((byte,))
                ids.extend(v.ids_by_bytes.get(longer, ()))
                if len(longer) < v.longest_token:
                    open_texts.append((longer, after))
        return pack(np.array(ids, np.int64), v.size)


class OptionsMachine(LiteralMachine[int]):
    """The options as a tree of bytes; a state is a node."""

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[bytes]):
        super().__init__(vocabulary)
        self._children: list[dict[int, int]] = [{}]
        self._ends: set[int] = set()
        for text in texts:
            node = 0
            for byte in text:
                child = self._children[node].get(byte)
                if child is None:
                    child = self._children[node][byte] = len(self._children)
                    self._children.append({})
                node = child
            self._ends.add(node)

    @property
    def start(self) -> int:
        return 0

    def edges(self, state: int) -> Iterable[tuple[int, int]]:
        return self._children[state].items()

    def accepts(self, state: int) -> bool:
        return state in self._ends


def options(vocabulary: Vocabulary, texts: Sequence[str | bytes]) -> MachineConstraint[int]:
    """One of `texts`, in any tokenization; an option stays reachable past a shorter one that begins it.

    Without options nothing is allowed, and the mask is empty. Raises `ConstraintError` for an option that is
    no text.
    """
    if isinstance(texts, (str, bytes)) or not all(isinstance(text, (str, bytes)) for text in texts):
        raise ConstraintError("options must be a list of strings")
    spelled = tuple(text.encode() if isinstance(text, str) else text for text in texts)
    key: Hashable = ("options", vocabulary.key, spelled)
    return MachineConstraint(compiled.get(key, lambda: OptionsMachine(vocabulary, spelled)))
