"""A byte automaton that is built state by state, as text reaches it.

A state is a set of terms, what may still follow (Antimirov's partial derivatives). Counted repeats stay
counters, so a pattern costs nothing before its states are visited. Terms may call rules, so that documents
that nest are followed too: what is left of the outer ones then stands in the term.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from threading import Lock
from typing import TypeVar, cast

from constraints.errors import ConstraintError
from constraints.regex_syntax import Ranges

ByteRange = tuple[int, int]
Sequences = tuple[tuple[ByteRange, ...], ...]
DEAD = -1


class Term:
    """A regex over bytes. Terms are interned by their automaton, so identity is equality."""

    __slots__ = ("nullable", "order", "steps")

    def __init__(self, nullable: bool, order: int):
        self.nullable = nullable
        self.order = order
        self.steps: tuple[tuple[ByteRange, Term], ...] | None = None


T = TypeVar("T", bound=Term)


class Bytes(Term):
    """One character, or the rest of one: any of the sequences of byte ranges."""

    __slots__ = ("sequences",)
    sequences: Sequences


class Cat(Term):
    """`head`, which is no Cat, and then `tail`."""

    __slots__ = ("head", "tail")
    head: Term
    tail: Term


class Alt(Term):
    """Any of the options."""

    __slots__ = ("options",)
    options: tuple[Term, ...]


class Repeat(Term):
    """`low` to `high` times `body`; `high` is None for no bound."""

    __slots__ = ("body", "high", "low")
    body: Term
    low: int
    high: int | None


class Call(Term):
    """A rule, whose term is made when text reaches it."""

    __slots__ = ("make",)
    make: Callable[[], Term]


class Watched(Term):
    """`body`, in a state that is told apart: see `Automaton.watched`."""

    __slots__ = ("body",)
    body: Term


FREE, WATCHED, DOUBTFUL = 0, 1, 2
"""A state without watched text; inside watched text; inside it, or else in other text."""


class Automaton:
    """States are ints that are never reused; 0 is the start."""

    start = 0
    max_terms: int | None = None
    """Terms of one state, beyond which it is a `ConstraintError`."""
    max_new_terms: int | None = None
    """Terms that are made for one state, beyond which it is a `ConstraintError`."""

    def __init__(self) -> None:
        self._interned: dict[tuple[object, ...], Term] = {}
        self._most_interned = float("inf")
        self.epsilon = self._intern(Term, True, "epsilon")
        self._states: list[tuple[Term, ...]] = []
        self._numbers: dict[tuple[Term, ...], int] = {}
        self._rows: list[list[int] | None] = []
        self.watched: list[int] = []
        """FREE, WATCHED or DOUBTFUL, by state."""
        self._open: set[Term] = set()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._states)

    def accepts(self, state: int) -> bool:
        """Whether the text may end in `state`."""
        return any(term.nullable for term in self._states[state])

    def row(self, state: int) -> list[int]:
        """The next state for each of the 256 bytes, DEAD where none."""
        known = self._rows[state]
        if known is None:
            # A script's thread may step an automaton that the engine's thread steps too.
            with self._lock:
                self._make_room()
                known = self._rows[state] = self._rows[state] or self._expand(self._states[state])
        return known

    def step(self, state: int, text: bytes) -> int:
        """The state after `text`, DEAD when no match begins so."""
        for byte in text:
            state = (self._rows[state] or self.row(state))[byte]
            if state < 0:
                return DEAD
        return state

    def next_bytes(self, state: int) -> bytes:
        """Every byte that may follow `state`, ascending."""
        spans = [span for term in self._states[state] for span, _ in self.steps_of(term)]
        if len(spans) == 1:
            return bytes(range(spans[0][0], spans[0][1] + 1))
        return bytes(byte for byte, after in enumerate(self.row(state)) if after != DEAD)

    def terms_of(self, state: int) -> tuple[Term, ...]:
        """What may still follow `state`: the text matches one of these terms."""
        return self._states[state]

    def steps_of(self, term: Term) -> tuple[tuple[ByteRange, Term], ...]:
        """What may follow each first byte of `term`."""
        if term.steps is None:
            with self._lock:
                self._make_room()
                return self._steps(term)
        return term.steps

    def joined(self, head: Term, tail: Term) -> Term:
        """`head` and then `tail`, for who has no automaton to build."""
        with self._lock:
            self._make_room()
            return self.cat(head, tail)

    def num_terms(self) -> int:
        """How many terms it remembers."""
        return len(self._interned)

    def _make_room(self) -> None:
        if self.max_new_terms is not None:
            self._most_interned = len(self._interned) + self.max_new_terms

    # Construction -----------------------------------------------------------------------------------------

    def _intern(self, kind: type[T], nullable: bool, *parts: object) -> T:
        key = (kind, *parts)
        term = self._interned.get(key)
        if term is None:
            if len(self._interned) >= self._most_interned:
                raise ConstraintError(
                    f"its repeats of long repeats take more than {self.max_new_terms} terms to follow"
                )
            term = self._interned[key] = kind(nullable, len(self._interned))
        return cast(T, term)

    def sequences(self, sequences: Sequences) -> Term:
        """Any of the sequences of byte ranges."""
        term = self._intern(Bytes, False, sequences)
        term.sequences = sequences
        return term

    def cat(self, head: Term, tail: Term) -> Term:
        """`head` and then `tail`."""
        if head is self.epsilon:
            return tail
        if tail is self.epsilon:
            return head
        heads = []
        while isinstance(head, Cat):
            heads.append(head.head)
            head = head.tail
        heads.append(head)
        for part in reversed(heads):
            made = self._intern(Cat, part.nullable and tail.nullable, part, tail)
            made.head, made.tail = part, tail
            tail = made
        return tail

    def alt(self, options: list[Term]) -> Term:
        """Any of the options, of which there is one at least."""
        ordered = tuple(flat(options))
        if len(ordered) == 1:
            return ordered[0]
        made = self._intern(Alt, any(o.nullable for o in ordered), ordered)
        made.options = ordered
        return made

    def repeat(self, body: Term, low: int, high: int | None) -> Term:
        """`low` to `high` times `body`."""
        if high == 0 or body is self.epsilon:
            return self.epsilon
        if body.nullable:
            low = 0
        if (low, high) == (1, 1):
            return body
        made = self._intern(Repeat, low == 0, body, low, high)
        made.body, made.low, made.high = body, low, high
        return made

    def call(self, name: Hashable, make: Callable[[], Term]) -> Term:
        """What `make` makes, which is never empty. Made once for a name, when text reaches it."""
        made = self._intern(Call, False, name)
        made.make = make
        return made

    def watch(self, body: Term) -> Term:
        """`body`; while text is inside it, `watched` says so."""
        if body is self.epsilon:
            return body
        made = self._intern(Watched, body.nullable, body)
        made.body = body
        return made

    # Derivatives ------------------------------------------------------------------------------------------

    def _steps(self, term: Term) -> tuple[tuple[ByteRange, Term], ...]:
        """What may follow each first byte of `term`."""
        if term.steps is None:
            found: dict[tuple[ByteRange, Term], None] = {}
            rest: Term | None = term
            # A chain of optional parts is as long as the pattern, so it is a loop, not a recursion.
            while isinstance(rest, Cat):
                tail = rest.tail
                for first, after in self._steps(rest.head):
                    found[first, self.cat(after, tail)] = None
                rest = tail if rest.head.nullable else None
            if rest is not None:
                found.update(dict.fromkeys(self._simple_steps(rest)))
            term.steps = tuple(found)
        return term.steps

    def _simple_steps(self, term: Term) -> list[tuple[ByteRange, Term]]:
        if isinstance(term, Bytes):
            grouped: dict[ByteRange, list[tuple[ByteRange, ...]]] = {}
            for sequence in term.sequences:
                grouped.setdefault(sequence[0], []).append(sequence[1:])
            return [
                (first, self.sequences(tuple(rests)) if rests[0] else self.epsilon)
                for first, rests in grouped.items()
            ]
        if isinstance(term, Alt):
            return [step for option in term.options for step in self._steps(option)]
        if isinstance(term, Watched):
            return [(first, self.watch(after)) for first, after in self._steps(term.body)]
        if isinstance(term, Call):
            return self._called(term)
        if isinstance(term, Repeat):
            high = None if term.high is None else term.high - 1
            rest = self.repeat(term.body, max(term.low - 1, 0), high)
            return [(first, self.cat(after, rest)) for first, after in self._steps(term.body)]
        return []

    def _called(self, term: Call) -> list[tuple[ByteRange, Term]]:
        if term in self._open:
            raise ConstraintError("a rule begins with itself")
        self._open.add(term)
        try:
            return list(self._steps(term.make()))
        finally:
            self._open.discard(term)

    def _expand(self, state: tuple[Term, ...]) -> list[int]:
        steps = [step for term in state for step in self._steps(term)]
        row = [DEAD] * 256
        if len(steps) == 1:
            (low, high), after = steps[0]
            row[low : high + 1] = [self._number([after])] * (high + 1 - low)
            return row
        begun: defaultdict[int, list[Term]] = defaultdict(list)
        ended: defaultdict[int, list[Term]] = defaultdict(list)
        for (low, high), after in steps:
            begun[low].append(after)
            ended[high + 1].append(after)
        # From the lowest byte to the highest: where they lead, and by how many steps.
        targets: dict[Term, int] = {}
        for low, end in pairwise(sorted(begun.keys() | ended.keys())):
            for after in ended.get(low, ()):
                targets[after] -= 1
                if not targets[after]:
                    del targets[after]
            for after in begun.get(low, ()):
                targets[after] = targets.get(after, 0) + 1
            if targets:
                row[low:end] = [self._number(list(targets))] * (end - low)
        return row

    def _number(self, terms: list[Term]) -> int:
        """The state of a set of terms."""
        state = tuple(terms)
        if len(state) > 1:
            state = tuple(sorted(self._absorb(terms), key=attrgetter("order")))
        number = self._numbers.get(state)
        if number is None:
            if self.max_terms is not None and len(state) > self.max_terms:
                raise ConstraintError(
                    f"the text so far can be read in {len(state)} ways at once, and {self.max_terms} are"
                    " allowed; use a regex whose repeats overlap less"
                )
            number = self._numbers[state] = len(self._states)
            self._states.append(state)
            self._rows.append(None)
            inside = any(isinstance(t.head if isinstance(t, Cat) else t, Watched) for t in state)
            self.watched.append(FREE if not inside else WATCHED if len(state) == 1 else DOUBTFUL)
        return number

    def _absorb(self, terms: list[Term]) -> list[Term]:
        """`terms` without those that a term with a larger counter covers: `x{0,9}` covers `x{0,8}`."""
        widest: dict[tuple[object, ...], tuple[float, Term]] = {}
        for term in terms:
            key, high = _counter(term)
            if key not in widest or high > widest[key][0]:
                widest[key] = (high, term)
        return [term for _, term in widest.values()]


def flat(options: list[Term]) -> dict[Term, None]:
    """Every one of `options` once, and of those that are options themselves theirs."""
    found: dict[Term, None] = {}
    for option in options:
        found.update(dict.fromkeys(option.options if isinstance(option, Alt) else [option]))
    return found


def split(term: Term) -> tuple[Term, Term | None]:
    """What `term` begins with, and the rest of it."""
    return (term.head, term.tail) if isinstance(term, Cat) else (term, None)


def _counter(term: Term) -> tuple[tuple[object, ...], float]:
    """What `term` is but for the counter in front of it, and the counter."""
    lead: Term | None = None
    rest: Term = term
    if isinstance(term, Cat) and not isinstance(term.head, Repeat):
        # The rest of a character may stand before the counter.
        lead, rest = term.head, term.tail
    tail = rest.tail if isinstance(rest, Cat) else None
    if isinstance(rest, Cat):
        rest = rest.head
    if not isinstance(rest, Repeat) or rest.low:
        return (term,), 0.0
    return (lead, rest.body, tail), float("inf") if rest.high is None else rest.high


# UTF-8 ----------------------------------------------------------------------------------------------------


MAX_KEPT_RANGES = 16
"""Ranges of a class whose UTF-8 is remembered: classes may be as large as patterns."""


def utf8(ranges: Ranges) -> Sequences:
    """The UTF-8 of the code points in `ranges`: sequences of byte ranges that together match exactly them."""
    return _kept_utf8(ranges) if len(ranges) <= MAX_KEPT_RANGES else _utf8(ranges)


def _utf8(ranges: Ranges) -> Sequences:
    return tuple(sequence for low, high in ranges for sequence in _utf8_range(low, high))


_kept_utf8 = lru_cache(1024)(_utf8)


LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)


def _utf8_range(low: int, high: int) -> list[tuple[ByteRange, ...]]:
    for last in LAST_OF_LENGTH:
        if low <= last < high:
            return _utf8_range(low, last) + _utf8_range(last + 1, high)
    length = next(n for n, last in enumerate(LAST_OF_LENGTH) if high <= last)
    for bits in (6 * n for n in range(1, length + 1)):
        below = (1 << bits) - 1
        if low & ~below != high & ~below:
            # Above `bits` the code points differ, so below it each end must be whole or be split off.
            if low & below:
                return _utf8_range(low, low | below) + _utf8_range((low | below) + 1, high)
            if high & below != below:
                return _utf8_range(low, (high & ~below) - 1) + _utf8_range(high & ~below, high)
    return [tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))]
