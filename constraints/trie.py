"""All text tokens of a vocabulary as a tree of bytes in arrays, walked a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from constraints.vocabulary import Vocabulary, once_per_vocabulary

Ints = NDArray[np.int32]
DEAD = -1


@dataclass
class Level:
    """The prefixes of one length, sorted. Children of a node are neighbours on the next level."""

    byte: NDArray[np.uint8]
    """The last byte of each prefix."""
    first_child: Ints
    """int32[nodes + 1]: node i has the children first_child[i] to first_child[i + 1] of the next level."""
    token: Ints
    """The token that a prefix spells, -1 for none."""


class TokenTrie:
    """The tree of one vocabulary; `of` builds it once."""

    def __init__(self, vocabulary: Vocabulary):
        self.size = vocabulary.size
        spellings = vocabulary.spellings
        ids = np.array([vocabulary.ids_by_bytes[text][0] for text in spellings], np.int32)
        self.duplicates = np.array(
            [(same[0], other) for same in vocabulary.ids_by_bytes.values() for other in same[1:]], np.int64
        ).reshape(-1, 2)
        self.root_children = 0
        self.weight = [0] * 256
        """How many tokens begin with each byte: what a walk through it costs at most."""
        self.levels = _levels(spellings, ids)
        if self.levels:
            self.root_children = len(self.levels[0].byte)
            self.weight = np.bincount([text[0] for text in spellings], minlength=256).tolist()

    def weight_of(self, first: Iterable[int]) -> int:
        """How many tokens begin with one of the bytes `first`."""
        return sum(map(self.weight.__getitem__, first))

    def walk(self, table: Ints, start: int) -> Ints:
        """The state that each token leads to from `start`: int32[size], DEAD where it may not come.

        `table` is int32[states, 256], DEAD where a byte may not come.
        """
        return self.walk_by(lambda states, bytes_: table[states, bytes_], start)

    def walk_by(self, step: Callable[[Ints, NDArray[np.uint8]], Ints], start: int) -> Ints:
        """As `walk`, with a function from states and bytes, both of one length, to the next states."""
        found = np.full(self.size, DEAD, np.int32)
        nodes = np.arange(self.root_children)
        states = np.full(self.root_children, start, np.int32)
        for level in self.levels:
            states = step(states, level.byte[nodes])
            alive = np.flatnonzero(states >= 0)
            nodes, states = nodes[alive], states[alive]
            tokens = level.token[nodes]
            spelled = tokens >= 0
            found[tokens[spelled]] = states[spelled]
            first = level.first_child[nodes]
            counts = level.first_child[nodes + 1] - first
            if not len(counts) or not (total := int(counts.sum())):
                break
            # Node i contributes first[i], first[i] + 1, ...: a running count minus where its run begins.
            begins = np.repeat(np.cumsum(counts) - counts, counts)
            nodes = np.repeat(first, counts) + np.arange(total) - begins
            states = np.repeat(states, counts)
        found[self.duplicates[:, 1]] = found[self.duplicates[:, 0]]
        return found


class StepTable:
    """The steps of an automaton as an array that fills as states are met. States are numbered from 0."""

    def __init__(self, row: Callable[[int], list[int]]):
        self._row = row
        self._table = np.full((64, 256), DEAD, np.int32)
        self._known = np.zeros(64, bool)
        self._lock = Lock()

    def __call__(self, states: Ints, texts: NDArray[np.uint8]) -> Ints:
        """The states after one byte each."""
        if len(states):
            # Of two threads that walk at once, one would lose rows while the other grows the table.
            with self._lock:
                self._fill(states)
        return self._table[states, texts]

    def _fill(self, states: Ints) -> None:
        while (highest := int(states.max())) >= len(self._known):
            self._table = np.concatenate([self._table, np.full_like(self._table, DEAD)])
            self._known = np.concatenate([self._known, np.zeros_like(self._known)])
        if highest < 0:
            return
        for state in np.unique(states[~self._known[states]]).tolist():
            self._table[state] = self._row(state)
            self._known[state] = True


def _levels(spellings: list[bytes], ids: Ints) -> list[Level]:
    """The levels of sorted, distinct `spellings`; `ids` are their tokens."""
    lengths = np.array([len(text) for text in spellings], np.int64)
    text = np.frombuffer(b"".join(spellings), np.uint8)
    offsets = np.cumsum(lengths) - lengths
    rows = np.arange(len(spellings))
    parents = np.zeros(len(spellings), np.int64)
    levels: list[Level] = []
    for depth in range(int(lengths.max(initial=0))):
        longer = lengths[rows] > depth
        rows, parents = rows[longer], parents[longer]
        last = text[offsets[rows] + depth]
        fresh = np.ones(len(rows), bool)
        fresh[1:] = (parents[1:] != parents[:-1]) | (last[1:] != last[:-1])
        nodes = np.cumsum(fresh) - 1
        if levels:
            counts = np.bincount(parents[fresh], minlength=len(levels[-1].byte))
            levels[-1].first_child = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        count = int(fresh.sum())
        token = np.full(count, DEAD, np.int32)
        ends = lengths[rows] == depth + 1
        token[nodes[ends]] = ids[rows[ends]]
        levels.append(Level(last[fresh], np.zeros(count + 1, np.int32), token))
        parents = nodes
    return levels


trie_of = once_per_vocabulary(TokenTrie)
"""The tree of a vocabulary, built once."""
