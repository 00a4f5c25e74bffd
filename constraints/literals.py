"""Constraints made of literal text: `options` and `substring`. Their masks come from a few table look-ups."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from constraints.errors import ConstraintError
from constraints.machine import Machine, MachineConstraint, State, compiled
from constraints.token_set import Row, pack
from constraints.trie import DEAD, Ints, trie_of
from constraints.vocabulary import Vocabulary

MAX_OPTION_BYTES = 200_000
"""Of all options together: a tree of 50 MB, whose first mask takes some 20 ms."""
MANY = 100
"""Options, beyond which a walk of all tokens is quicker than a look at one text after another."""
NODES_IN_A_STATE = 10
"""A node takes some 0.25 KB, a tenth of what states are counted as."""
SPACE = 0x20
NO_BYTE = -1
"""Stands after the end of a template."""
FEW = 8
NOWHERE = 0, 0, 0


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
        self._is_wide = len(self._ends) > MANY
        if self._is_wide:
            steps = [
                (node << 8 | byte, child)
                for node, onward in enumerate(self._children)
                for byte, child in sorted(onward.items())
            ]
            # After the last there must be one more, which a search beyond all of them finds.
            self._keys, self._after = np.ascontiguousarray(np.array([*steps, (-1, DEAD)]).T)

    @property
    def start(self) -> int:
        return 0

    def num_states(self) -> int:
        return len(self._children) // NODES_IN_A_STATE

    def edges(self, state: int) -> Iterable[tuple[int, int]]:
        return self._children[state].items()

    def text_row(self, state: int, tokens: list[int]) -> Row:
        if not self._is_wide:
            return super().text_row(state, tokens)
        found = trie_of(self.vocabulary).walk_by(self._walk, state)
        return pack(np.flatnonzero(found >= 0), self.vocabulary.size)

    def _walk(self, states: Ints, texts: NDArray[np.uint8]) -> Ints:
        """The nodes after one byte each."""
        wanted = states.astype(np.int64) << 8 | texts
        at = self._keys[:-1].searchsorted(wanted)
        return np.where(self._keys[at] == wanted, self._after[at], DEAD).astype(np.int32)

    def accepts(self, state: int) -> bool:
        return state in self._ends


def options(vocabulary: Vocabulary, texts: Sequence[str | bytes]) -> MachineConstraint[int]:
    """One of `texts`, in any tokenization; an option stays reachable past a shorter one that begins it.

    Without options nothing is allowed, and the mask is empty. Raises `ConstraintError` for an option that is
    no text, and for more than 200,000 bytes of them.
    """
    given = None if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable) else tuple(texts)
    if given is None or not all(isinstance(text, (str, bytes)) for text in given):
        raise ConstraintError("options must be a list of strings")
    spelled = tuple(text.encode() if isinstance(text, str) else text for text in given)
    if (size := sum(map(len, spelled))) > MAX_OPTION_BYTES:
        raise ConstraintError(
            f"options have {size:,} bytes in all; {MAX_OPTION_BYTES:,} are allowed, so give fewer or shorter"
        )
    key: Hashable = ("options", vocabulary.key, spelled)
    return MachineConstraint(compiled.get(key, lambda: OptionsMachine(vocabulary, spelled)))


class SubstringMachine(LiteralMachine[int]):
    """All places of the template at which the text so far may stand. States are numbered as they are met.

    What the text may have begun with is an interval of the starts of words: a state costs the same whatever
    the length of the template. An interval is sorted by the byte that follows when its state is left.
    """

    def __init__(self, vocabulary: Vocabulary, template: bytes, end: bytes):
        super().__init__(vocabulary)
        self.end = end
        self._text = np.append(np.frombuffer(template, np.uint8), NO_BYTE).astype(np.int16)
        self._starts = np.append(0, np.flatnonzero(self._text == SPACE) + 1).astype(np.int32)
        # The starts as an interval, bytes after them, and written bytes of the end mark (-1: none).
        self._states: list[tuple[int, int, int, int]] = []
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._ways: list[tuple[list[tuple[int, int]], bool] | None] = []
        self._lock = Lock()
        self._number(0, 0, len(self._starts), 0, -1)

    @property
    def start(self) -> int:
        return 0

    def _number(self, first: int, low: int, high: int, depth: int, written: int) -> int:
        """The state of the starts from `low` to `high`, the least of which is `first`."""
        # Of two sets of places one holds the other or they are apart, so the first and the size name a set.
        key = (first + depth if low < high else -1, high - low, written)
        number = self._numbers.setdefault(key, len(self._states))
        if number == len(self._states):
            self._states.append((low, high, depth, written))
            self._ways.append(None)
        return number

    def num_states(self) -> int:
        return len(self._states)

    def accepts(self, state: int) -> bool:
        if self.end:
            return self._states[state][3] == len(self.end)
        return self._ways_on(state)[1]

    def edges(self, state: int) -> list[tuple[int, int]]:
        return self._ways_on(state)[0]

    def _ways_on(self, state: int) -> tuple[list[tuple[int, int]], bool]:
        """As `edges`, and whether a word ends in `state`."""
        known = self._ways[state]
        if known is None:
            # A script's thread may step a machine that the engine's thread steps too.
            with self._lock:
                known = self._ways[state] = self._ways[state] or self._find_ways(*self._states[state])
        return known

    def _find_ways(self, low: int, high: int, depth: int, written: int) -> tuple[list[tuple[int, int]], bool]:
        after = self._split(low, high, depth)
        ends = NO_BYTE in after or SPACE in after
        after.pop(NO_BYTE, None)
        marks: dict[int, int] = {}
        if self.end and ends:
            marks[self.end[0]] = 1
            if self.end[0] == SPACE:
                after.pop(SPACE, None)
        if 0 <= written < len(self.end):
            marks[self.end[written]] = max(written + 1, marks.get(self.end[written], 0))
        edges = []
        for byte in dict.fromkeys([*after, *marks]):
            start, begin, end = after.get(byte, NOWHERE)
            edges.append((byte, self._number(start, begin, end, depth + 1, marks.get(byte, -1))))
        return edges, ends

    def _split(self, low: int, high: int, depth: int) -> dict[int, tuple[int, int, int]]:
        """By the byte after `depth` others: the first start and the interval of all, which it makes."""
        starts = self._starts[low:high]
        if high - low <= FEW:
            # Twice as quick as numpy, and most intervals of prose are as short.
            groups: dict[int, list[int]] = {}
            for start in starts.tolist():
                groups.setdefault(self._text.item(start + depth), []).append(start)
            found = {}
            for byte, group in groups.items():
                found[byte] = min(group), low, low + len(group)
                low += len(group)
            if len(groups) > 1:
                starts[:] = list(chain.from_iterable(groups.values()))
            return found
        following = self._text[starts + depth]
        order = following.argsort(kind="stable")
        starts[:] = starts[order]
        following = following[order]
        begins = [0, *(np.flatnonzero(following[1:] != following[:-1]) + 1).tolist()]
        firsts = np.minimum.reduceat(starts, begins).tolist()
        bounds = [*(low + begin for begin in begins), high]
        spans = zip(firsts, bounds, bounds[1:], strict=False)
        return dict(zip(following[begins].tolist(), spans, strict=True))


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
