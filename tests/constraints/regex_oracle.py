"""A regex matcher for the tests: Python's own parser, a character automaton, and UTF-8 tails by intervals."""

from __future__ import annotations

import re
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]

Interval = tuple[int, int]
TOP = 0x10FFFF
CATEGORIES = {
    op.CATEGORY_DIGIT: r"[0-9]",
    op.CATEGORY_NOT_DIGIT: r"[^0-9]",
    op.CATEGORY_WORD: r"[a-zA-Z0-9_]",
    op.CATEGORY_NOT_WORD: r"[^a-zA-Z0-9_]",
    op.CATEGORY_SPACE: r"[ \t\n\r\f\v]",
    op.CATEGORY_NOT_SPACE: r"[^ \t\n\r\f\v]",
}


class RegexOracle:
    """Answers for whole texts: may bytes begin a match, are they one. Slow and simple."""

    def __init__(self, pattern: str):
        self.edges: list[list[tuple[list[Interval], int]]] = [[]]
        self.jumps: list[list[int]] = [[]]
        self.end = self._sequence(_parser.parse(pattern, re.ASCII), 0)

    def viable(self, text: bytes) -> bool:
        """Whether some match begins with `text`."""
        head, tail = split_tail(text)
        if head is None:
            return False
        states = self._after(head)
        if not tail:
            return bool(states)
        wanted = characters_with_prefix(tail)
        return any(overlap(found, wanted) for state in states for found, _ in self.edges[state])

    def matches(self, text: bytes) -> bool:
        head, tail = split_tail(text)
        return head is not None and not tail and self.end in self._after(head)

    def _after(self, text: str) -> set[int]:
        states = self._closed({0})
        for char in text:
            code = (ord(char), ord(char))
            states = self._closed(
                {to for s in states for found, to in self.edges[s] if overlap(found, [code])}
            )
        return states

    def _closed(self, states: set[int]) -> set[int]:
        queue = list(states)
        while queue:
            for to in self.jumps[queue.pop()]:
                if to not in states:
                    states.add(to)
                    queue.append(to)
        return states

    def _state(self) -> int:
        self.edges.append([])
        self.jumps.append([])
        return len(self.edges) - 1

    def _sequence(self, items, at: int) -> int:
        for kind, value in items:
            at = self._item(kind, value, at)
        return at

    def _item(self, kind, value, at: int) -> int:
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(*value, at)
        if kind is op.BRANCH:
            end = self._state()
            for option in value[1]:
                self.jumps[self._sequence(option, at)].append(end)
            return end
        if kind is op.SUBPATTERN:
            return self._sequence(value[3], at)
        if kind is op.AT:
            return at
        end = self._state()
        self.edges[at].append((characters(kind, value), end))
        return end

    def _repeat(self, low: int, high, body, at: int) -> int:
        for _ in range(low):
            at = self._sequence(body, at)
        if high is op.MAXREPEAT:
            # A body that may be empty loops through a state of its own.
            loop = self._state()
            self.jumps[at].append(loop)
            self.jumps[self._sequence(body, loop)].append(loop)
            return loop
        end = self._state()
        self.jumps[at].append(end)
        for _ in range(high - low):
            at = self._sequence(body, at)
            self.jumps[at].append(end)
        return end


def characters(kind, value) -> list[Interval]:
    """The code points of one item of Python's parse tree."""
    if kind is op.LITERAL:
        return [(value, value)]
    if kind is op.NOT_LITERAL:
        return complement([(value, value)])
    if kind is op.ANY:
        return complement([(10, 10)])
    if kind is op.RANGE:
        return [value]
    if kind is op.CATEGORY:
        [(_, items)] = _parser.parse(CATEGORIES[value])
        return characters(op.IN, items)
    assert kind is op.IN, kind
    found = [interval for k, v in value if k is not op.NEGATE for interval in characters(k, v)]
    return complement(found) if value[0][0] is op.NEGATE else found


def complement(intervals: list[Interval]) -> list[Interval]:
    found, start = [], 0
    for low, high in sorted(intervals):
        if start < low:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, TOP)]


def overlap(left: list[Interval], right: list[Interval]) -> bool:
    return any(max(a, c) <= min(b, d) for a, b in left for c, d in right)


def split_tail(text: bytes) -> tuple[str | None, bytes]:
    """The characters of `text`, None when it is no UTF-8, and the bytes of a character that is cut off."""
    for cut in range(4):
        try:
            return text[: len(text) - cut].decode(), text[len(text) - cut :] if cut else b""
        except UnicodeDecodeError as error:
            if "unexpected end" not in error.reason:
                return None, b""
    return None, b""


def characters_with_prefix(prefix: bytes) -> list[Interval]:
    """The code points, without surrogates, whose UTF-8 begins with `prefix`, the start of one character."""
    lead = prefix[0]
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    bits = lead & (0x7F >> length)
    for byte in prefix[1:]:
        bits = bits << 6 | byte & 0x3F
    shift = 6 * (length - len(prefix))
    low, high = bits << shift, (bits + 1 << shift) - 1
    low = max(low, {2: 0x80, 3: 0x800, 4: 0x10000}[length])
    high = min(high, TOP)
    return [
        (max(low, a), min(high, b)) for a, b in ((0, 0xD7FF), (0xE000, TOP)) if max(low, a) <= min(high, b)
    ]
