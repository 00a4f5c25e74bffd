"""Masks of states that stay on a class of characters, from rows of tokens instead of a walk.

In `[a-z]+@` every token of letters may come, whatever its length. Only the tokens that leave the class have
to be tried, and they are few.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from constraints.automaton import DEAD, Alt, Automaton, Bytes, Cat, Repeat, Sequences, Term, split, utf8
from constraints.byte_rows import ASCII, ByteRows, Span, byte_rows_of
from constraints.regex_syntax import SURROGATES, TOP
from constraints.token_set import Row, unpack
from constraints.trie import trie_of
from constraints.vocabulary import Vocabulary

MAX_TRIED = 400
"""Tokens that are tried one by one for a mask: some 100 µs."""

FEW = 64
"""Tokens that are sooner tried than looked at together."""
MAX_SPELLED = 2000
"""Tokens that begin with the first bytes of what is no loop."""
MAX_LOOPS = 8
"""Loops of one state."""
MAX_OPTIONS = 64
"""Options that are looked at one by one; more of them are taken for literal text."""
MAX_TERMS = 1000
"""Terms that are looked at for the letters of what follows a loop."""

ANY_HIGH = utf8(((ASCII, SURROGATES[0] - 1), (SURROGATES[1] + 1, TOP)))
"""All characters that are not ASCII."""
HIGH = 1 << ASCII
"""In a class as bits, by ASCII character: some character that is not ASCII."""
ALL_ASCII = HIGH - 1


@dataclass
class Loop:
    """`first`, then characters of `inside`, then `rest`. Classes of characters are bits."""

    first: list[Span] | None
    """The bytes that must come first; None for none."""
    inside: int
    most: int | None
    """How many characters may come from `inside`; None for no bound."""
    rest: Term | None
    leaving: int
    """The first character that is not of `inside` is one of these."""


def loop_of(automaton: Automaton, term: Term) -> Loop | None:
    """What `term` begins with, when that is a loop."""
    first = None
    head, rest = split(term)
    if isinstance(head, Bytes) and rest is not None and all(len(part) == 1 for part in head.sequences):
        first = [sequence[0] for sequence in head.sequences]
        head, rest = split(rest)
    if not isinstance(head, Repeat):
        return None
    body, most = head.body, head.high
    if isinstance(body, Repeat) and body.high is None:
        body, most = body.body, None
    inside = _class(body.sequences) if isinstance(body, Bytes) else None
    if inside is None:
        return None
    leaving = 0 if rest is None else _bits([span for span, _ in automaton.steps_of(rest)])
    if leaving & inside:
        # What follows may begin with characters of the loop, and be anywhere when another one comes.
        leaving = _letters(rest)
    leaving &= ~inside
    return None if leaving & HIGH else Loop(first, inside, most, rest, leaving)


def _class(sequences: Sequences) -> int | None:
    """A class of characters as bits; None when it has some that are not ASCII and not all of them."""
    high = tuple(sequence for sequence in sequences if len(sequence) > 1)
    if high and high != ANY_HIGH:
        return None
    spans = [sequence[0] for sequence in sequences if len(sequence) == 1]
    return _bits(spans) | (HIGH if high else 0)


def _bits(spans: list[Span]) -> int:
    """Bytes as bits: one for each ASCII byte, and HIGH for any other."""
    bits = 0
    for low, high in spans:
        bits |= ((1 << (high + 1)) - (1 << low)) & ALL_ASCII
        if high >= ASCII:
            bits |= HIGH
    return bits


def _letters(term: Term | None) -> int:
    """All bytes that a text of `term` may have, as `_bits`; every byte when `term` is too long to look at."""
    bits, seen = 0, set[Term]()
    waiting = [] if term is None else [term]
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        if len(seen) > MAX_TERMS:
            return ALL_ASCII | HIGH
        if isinstance(part, Bytes):
            bits |= _bits([span for sequence in part.sequences for span in sequence])
        elif isinstance(part, Cat):
            waiting += (part.head, part.tail)
        elif isinstance(part, Alt):
            waiting += part.options
        elif isinstance(part, Repeat):
            waiting.append(part.body)
    return bits


def _spans(bits: int) -> list[Span]:
    """The ASCII bytes of `bits`."""
    spans: list[Span] = []
    bits &= ALL_ASCII
    while bits:
        low = (bits & -bits).bit_length() - 1
        # The carry runs through the ones from `low` on.
        length = ((bits >> low) + 1 & ~(bits >> low)).bit_length() - 1
        spans.append((low, low + length - 1))
        bits &= ~(((1 << length) - 1) << low)
    return spans


LEADS = (0xC2, 0xF4)
"""The bytes that begin a character that is not ASCII."""


def row_of(vocabulary: Vocabulary, automaton: Automaton, state: int) -> Row | None:
    """The text tokens that may follow `state`; None where no few operations tell. Writable."""
    parts = _parts(vocabulary, automaton, state)
    if parts is None:
        return None
    loops, others = parts
    sure = np.zeros(vocabulary.num_words, np.int32)
    found: list[int] = []
    if loops:
        tried = np.zeros_like(sure)
        for loop in loops:
            surely, perhaps = _rows_of(byte_rows_of(vocabulary), loop)
            sure |= surely
            tried |= perhaps
        if others:
            more = tried | byte_rows_of(vocabulary).first_in([(byte, byte) for byte in others])
            if _count(more & ~sure) <= MAX_TRIED:
                tried, others = more, set()
        tried &= ~sure
        if _count(tried) > MAX_TRIED:
            return None
        texts = vocabulary.texts
        found = [token for token in unpack(tried).tolist() if automaton.step(state, texts[token]) != DEAD]
    if others:
        spelled = _spelled(vocabulary, automaton, state, others)
        if spelled is None:
            return None
        found += spelled
    bits = sure.view(np.uint8)
    for token in found:
        bits[token >> 3] |= 1 << (token & 7)
    return sure


def _parts(vocabulary: Vocabulary, automaton: Automaton, state: int) -> tuple[list[Loop], set[int]] | None:
    """The loops with which `state` begins, and the bytes with which its other terms do."""
    onward = _next_bytes(automaton, state)
    if trie_of(vocabulary).weight_of(onward) <= FEW:
        return [], onward
    loops: list[Loop] = []
    others = set[int]()
    waiting = list(automaton.terms_of(state))
    while waiting:
        term = waiting.pop()
        head, tail = split(term)
        if isinstance(head, Alt):
            if len(head.options) > MAX_OPTIONS:
                return [], onward
            waiting += [o if tail is None else automaton.joined(o, tail) for o in head.options]
            continue
        loop = loop_of(automaton, term)
        if loop is None:
            others.update(_first_bytes(automaton, term))
            continue
        loops.append(loop)
        if len(loops) > MAX_LOOPS:
            return None
        if loop.first is None and loop.rest is not None and head.nullable:
            # The loop may be left at once; tokens that do so with a character of the loop are in its rows.
            begin = _first_bytes(automaton, loop.rest)
            if not any(loop.inside >> min(byte, ASCII) & 1 for byte in begin):
                waiting.append(loop.rest)
            else:
                others.update(byte for byte in begin if not loop.inside >> min(byte, ASCII) & 1)
    return loops, others


def _count(row: Row) -> int:
    return int(np.bitwise_count(row.view(np.uint32)).sum())


def _next_bytes(automaton: Automaton, state: int) -> set[int]:
    """The bytes that may follow `state`."""
    return set[int]().union(*(_first_bytes(automaton, term) for term in automaton.terms_of(state)))


def _first_bytes(automaton: Automaton, term: Term) -> set[int]:
    return set[int]().union(*(range(low, high + 1) for (low, high), _ in automaton.steps_of(term)))


def _spelled(vocabulary: Vocabulary, automaton: Automaton, state: int, first: set[int]) -> list[int] | None:
    """The tokens that may follow `state` and begin with a byte of `first`; None when that takes long."""
    weight = trie_of(vocabulary).weight_of(first)
    if weight > MAX_SPELLED:
        return None
    spellings, ids_by_bytes = vocabulary.spellings, vocabulary.ids_by_bytes
    found: list[int] = []
    if weight <= FEW:
        for byte in first:
            place = bisect_left(spellings, bytes((byte,)))
            while place < len(spellings) and (text := spellings[place])[0] == byte:
                if automaton.step(state, text) != DEAD:
                    found += ids_by_bytes[text]
                place += 1
        return found
    count = 0
    waiting = [(b"", state)]
    while waiting:
        text, at = waiting.pop()
        row = automaton.row(at)
        for byte in _next_bytes(automaton, at) if text else first:
            if (after := row[byte]) == DEAD:
                continue
            count += 1
            if count > MAX_TRIED:
                return None
            longer = text + bytes((byte,))
            place = bisect_left(spellings, longer)
            if place < len(spellings) and spellings[place].startswith(longer):
                found += ids_by_bytes.get(longer, ())
                waiting.append((longer, after))
    return found


def _rows_of(rows: ByteRows, loop: Loop) -> tuple[Row, Row]:
    """The tokens that stay in `loop`, and those of which the automaton must be asked."""
    if loop.first is None:
        begin = rows.first_in(_spans(loop.inside) + [LEADS] * (loop.inside >= HIGH))
    else:
        begin = rows.first_in(loop.first)
    sure = begin & ~rows.later_in(_spans(~loop.inside))
    if loop.inside < HIGH:
        sure &= ~rows.later_high
    else:
        sure &= rows.utf8 if loop.first is None else rows.utf8_later
    tried = np.zeros_like(sure)
    if loop.leaving:
        tried = begin & rows.later_in(_spans(loop.leaving))
        if _count(tried) > MAX_TRIED:
            tried &= ~rows.later_in(_spans(~(loop.inside | _letters(loop.rest))))
    if loop.most is not None:
        long = sure & rows.longer_than(loop.most)
        tried |= long
        sure ^= long
    return sure, tried
