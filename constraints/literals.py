"""Constraints made of literal text: `options` and `substring`. Their masks come from a few table look-ups."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from constraints.errors import ConstraintError
from constraints.machine import Machine, MachineConstraint, State, compiled
from constraints.token_set import Row, pack
from constraints.vocabulary import Vocabulary

SPACE = 0x20


class LiteralMachine(Machine[State]):
    """A machine with few ways on from every state, so that the texts of a token's length can be listed."""

    @abstractmethod
    def edges(self, state: State) -> Iterable[tuple[int, State]]:
        """The bytes that may follow and the states they lead to."""

    def next_bytes(self, state: State) -> bytes:
        return bytes(sorted(byte for byte, _ in self.edges(state)))

    def step(self, state: State, text: bytes) -> State | None:
        for byte in text:
            following = [after for label, after in self.edges(state) if label == byte]
            if not following:
                return None
            state = following[0]
        return state

    def text_row(self, state: State, tokens: list[int]) -> Row:
        v = self.vocabulary
        ids: list[int] = []
        open_texts = [(b"", state)]
        while open_texts:
            text, at = open_texts.pop()
            for byte, after in self.edges(at):
                longer = text + bytes((byte,))
                place = bisect_left(v.spellings, longer)
                if place < len(v.spellings) and v.spellings[place].startswith(longer):
                    ids.extend(v.ids_by_bytes.get(longer, ()))
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

    def num_states(self) -> int:
        return len(self._children)

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


SubstringState = tuple[tuple[int, ...], int]
"""Places in the template where the text may stand, and bytes of the end mark that are written (-1: none)."""


class SubstringMachine(LiteralMachine[int]):
    """All places of the template at which the text so far may stand. States are numbered as they are met."""

    def __init__(self, vocabulary: Vocabulary, template: bytes, end: bytes):
        super().__init__(vocabulary)
        self.template = template
        self.end = end
        starts = (0, *(place + 1 for place, byte in enumerate(template) if byte == SPACE))
        self._states: list[SubstringState] = []
        self._numbers: dict[SubstringState, int] = {}
        self._edges: list[list[tuple[int, int]] | None] = []
        self._start = self._number((starts, -1))

    @property
    def start(self) -> int:
        return self._start

    def _number(self, state: SubstringState) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            self._states.append(state)
            self._edges.append(None)
        return number

    def num_states(self) -> int:
        return len(self._states)

    def _ends_word(self, place: int) -> bool:
        return place == len(self.template) or self.template[place] == SPACE

    def accepts(self, state: int) -> bool:
        places, written = self._states[state]
        if self.end:
            return written == len(self.end)
        return any(map(self._ends_word, places))

    def edges(self, state: int) -> list[tuple[int, int]]:
        known = self._edges[state]
        if known is None:
            known = self._edges[state] = self._make_edges(*self._states[state])
        return known

    def _make_edges(self, places: tuple[int, ...], written: int) -> list[tuple[int, int]]:
        after: dict[int, list[int]] = {}
        stop = self.end[0] if self.end else None
        stops = False
        for place in places:
            ends = self._ends_word(place)
            stops |= ends and stop is not None
            if place < len(self.template) and not (ends and self.template[place] == stop):
                after.setdefault(self.template[place], []).append(place + 1)
        marks: dict[int, int] = {}
        if stops and stop is not None:
            marks[stop] = 1
        if 0 <= written < len(self.end):
            marks[self.end[written]] = max(written + 1, marks.get(self.end[written], 0))
        labels = dict.fromkeys([*after, *marks])
        return [(b, self._number((tuple(after.get(b, ())), marks.get(b, -1)))) for b in labels]


def substring(
    vocabulary: Vocabulary, template: str | bytes, end: str | bytes = '"'
) -> MachineConstraint[int]:
    """Whole words of `template`, in a row and verbatim, and then `end`.

    The text begins at the start of the template or after a space, and the words end before a space or at the
    end of the template. With an empty `end` the text may end after any word; otherwise only, and then always,
    after `end`, whose first byte means the end mark wherever a word may end.
    """
    spelled = [text.encode() if isinstance(text, str) else text for text in (template, end)]
    if not all(isinstance(text, bytes) for text in spelled):
        raise ConstraintError("substring takes a template and an end mark that are strings")
    key = ("substring", vocabulary.key, *spelled)
    return MachineConstraint(compiled.get(key, lambda: SubstringMachine(vocabulary, *spelled)))
