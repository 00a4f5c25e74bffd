"""Regex constraints: an automaton names the states, and the fastest source at hand fills in their masks.

The first few masks of a pattern come from rows of tokens or a walk of the token tree, where that is quick.
The others come from the index of the pattern, when there is one; else from llguidance, which needs 1 ms to
read a pattern, or from a walk where it meets its limits. All give the same masks, so one may take over from
another in the middle of a sequence.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from time import perf_counter

import numpy as np
from llguidance import LLMatcher

from constraints import guidance, loops, regex_syntax
from constraints.automaton import DEAD
from constraints.byte_rows import byte_rows_of
from constraints.errors import ConstraintError
from constraints.index import Builder, Index, builder
from constraints.machine import Machine, MachineConstraint, compiled
from constraints.regex_automaton import RegexAutomaton
from constraints.token_set import Row, pack
from constraints.trie import StepTable, trie_of
from constraints.vocabulary import Vocabulary

NARROW = 2_000
"""Tokens that begin with a byte that may follow: a walk over so many takes some 100 µs."""
MAX_QUICK = 8
"""Masks of a pattern that are made without llguidance: together they cost what it takes to read the pattern,
and its masks cost half as much."""
LONG = 1_000
"""Ranges of characters: a pattern of more makes what its first mask needs at once, in 5 ms and more."""
PARTS_OF_STATE = 10
"""Terms of the automaton, or ranges of characters in the pattern, that take what a state takes."""
WORTH_SECONDS = 0.02
"""Time spent on the masks of one pattern, after which it is worth an index."""


def prepare(vocabulary: Vocabulary) -> None:
    """Make what a first mask over `vocabulary` would wait for: 0.3 s at 49,152 tokens, 1.2 s at 131,072."""
    guidance.tokenizer_of(vocabulary)
    trie_of(vocabulary)
    byte_rows_of(vocabulary)


class RegexMachine(Machine[int]):
    """The states of one pattern over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, pattern: str, indexes: Builder = builder):
        super().__init__(vocabulary)
        prepare(vocabulary)
        self.pattern = pattern
        tree = regex_syntax.parse(pattern)
        if not regex_syntax.has_match(tree):
            raise ConstraintError(f"regex {regex_syntax.shown(pattern)} matches no text at all")
        self._tree = tree
        self._num_ranges = regex_syntax.num_ranges(tree)
        self._indexes = indexes
        self._seconds = 0.0
        self._num_quick = 0
        self._making = Lock()
        if self._num_ranges > LONG:
            # Who compiles may be a thread that only waits; who asks for a first mask is the engine.
            automaton = self.automaton
            _ = automaton.digest(self.start) if self.index else self.fresh

    @cached_property
    def index(self) -> Index | None:
        """The index, looked for on disk when more than a few masks are asked for: reading it takes 1 ms."""
        return self._indexes.find(self.vocabulary, self.pattern)

    @cached_property
    def automaton(self) -> RegexAutomaton:
        """The states."""
        # A cached property has no lock of its own, and the numbers of two automata are not the same.
        with self._making:
            if "automaton" not in self.__dict__:
                self.__dict__["automaton"] = RegexAutomaton(self._tree)
        made: RegexAutomaton = self.__dict__["automaton"]
        return made

    @cached_property
    def _steps_by_byte(self) -> StepTable:
        return StepTable(self.automaton.row)

    @cached_property
    def fresh(self) -> LLMatcher | None:
        """llguidance at the start of the pattern; None when the pattern is beyond its limits."""
        source = f"start: /{regex_syntax.render(self._tree)}/{guidance.NO_FORCING}"
        try:
            return guidance.matcher(self.vocabulary, source)
        except ConstraintError:
            return None

    @property
    def start(self) -> int:
        return RegexAutomaton.start

    def step(self, state: int, text: bytes) -> int | None:
        after = self.automaton.step(state, text)
        return None if after == DEAD else after

    def accepts(self, state: int) -> bool:
        if "automaton" not in self.__dict__:
            return regex_syntax.is_nullable(self._tree)
        return self.automaton.accepts(state)

    def next_bytes(self, state: int) -> bytes:
        return self.automaton.next_bytes(state)

    def num_states(self) -> int:
        parts, states = self._num_ranges, 0
        if "automaton" in self.__dict__:
            parts, states = parts + self.automaton.num_terms(), len(self.automaton)
        return states + parts // PARTS_OF_STATE

    def text_row(self, state: int, tokens: list[int]) -> Row:
        row = self.indexed_row(state)
        return self.walked_row(state) if row is None else row

    def indexed_row(self, state: int) -> Row | None:
        """The mask from the index, None when the index does not have it."""
        row = self.index.get(self.automaton.digest(state)) if self.index else None
        return None if row is None else row.copy()

    def quick_row(self, state: int) -> Row | None:
        """The mask where it is made soon without an index and without llguidance; None elsewhere."""
        if state == self.start and "automaton" not in self.__dict__ and not self._starts_quickly():
            return None
        row = loops.row_of(self.vocabulary, self.automaton, state)
        if row is None and trie_of(self.vocabulary).weight_of(self.following(state)) <= NARROW:
            row = self.walked_row(state)
        return row

    def early_row(self, state: int) -> Row | None:
        """As `quick_row`, for the first few masks of the pattern."""
        if self._num_quick >= MAX_QUICK:
            return None
        row = self.quick_row(state)
        self._num_quick = MAX_QUICK if row is None else self._num_quick + 1
        return row

    def _starts_quickly(self) -> bool:
        """Whether the first mask is worth an automaton, as far as the tree tells."""
        if regex_syntax.begins_with_loop(self._tree):
            return True
        return trie_of(self.vocabulary).weight_of(set(regex_syntax.first_ascii(self._tree))) <= NARROW

    def walked_row(self, state: int) -> Row:
        """The mask from a walk of the token tree."""
        found = trie_of(self.vocabulary).walk_by(self._steps_by_byte, state)
        return pack(np.flatnonzero(found >= 0), self.vocabulary.size)

    def spent(self, seconds: float) -> None:
        """Count time that an index would have saved, and ask for one when it is worth it."""
        self._seconds += seconds
        if self._seconds > WORTH_SECONDS and self.index is None:
            self._seconds = 0.0
            self._indexes.ask(self.vocabulary, self.pattern, self._use)

    def _use(self, index: Index) -> None:
        self.index = index


class RegexConstraint(MachineConstraint[int]):
    """A position in a regex. Its matcher follows only when a mask is needed that nobody has made."""

    machine: RegexMachine

    def __init__(self, machine: RegexMachine):
        super().__init__(machine)
        self._matcher: LLMatcher | None = None
        self._consumed = 0

    def _make_row(self) -> Row:
        state = self._state
        start = perf_counter()
        row = self.machine.early_row(state)
        indexed = None if row is not None else self.machine.indexed_row(state)
        if indexed is not None:
            row = indexed
        else:
            row = self._guided_row() if row is None else row
            self.machine.spent(perf_counter() - start)
        if self.machine.accepts(state):
            row = row | self.vocabulary.eos_row
        return row

    def _guided_row(self) -> Row:
        at = self._caught_up()
        if at is None:
            row = self.machine.quick_row(self._state)
            return self.machine.walked_row(self._state) if row is None else row
        if not at.is_stopped() and not at.is_accepting():
            # Only text tokens are in the engine's mask, which is then used as it is, uncopied.
            bits = at.compute_bitmask()
            if not at.is_error():
                return np.frombuffer(bits, np.int32, self.vocabulary.num_words)
        try:
            row = guidance.compute_row(self.vocabulary, at)
        except ConstraintError:
            self._matcher = None
            return self.machine.walked_row(self._state)
        if at.is_error():
            self._matcher = None
        return row

    def _caught_up(self) -> LLMatcher | None:
        """The matcher after all tokens so far; None where llguidance cannot follow."""
        if self._matcher is None:
            if self.machine.fresh is None:
                return None
            self._matcher, self._consumed = self.machine.fresh.deep_copy(), 0
        eos = self.vocabulary.eos_token_ids
        behind = [token for token in self._tokens[self._consumed :] if token not in eos]
        if behind and not self._matcher.consume_tokens(behind):
            self._matcher = None
            return None
        self._consumed = len(self._tokens)
        return self._matcher

    def rollback(self, count: int) -> None:
        super().rollback(count)
        if self._consumed > len(self._tokens):
            self._matcher = None

    def fork(self) -> MachineConstraint[int]:
        twin = super().fork()
        if self._matcher is not None:
            twin.__dict__["_matcher"] = self._matcher.deep_copy()
        return twin


def regex(vocabulary: Vocabulary, pattern: str) -> MachineConstraint[int]:
    """Text that `pattern` matches from its first character to its last.

    `\\d \\w \\s` are ASCII, `.` is any character but a newline, `^` and `$` at the ends are redundant. The
    text is always UTF-8.

    Raises `ConstraintError` naming the place of what is wrong or not supported (look-around,
    back references, assertions), and for a pattern that is too large.
    """
    if not isinstance(pattern, str):
        raise ConstraintError(f"a regex is a string, not {type(pattern).__name__}")
    key = ("regex", vocabulary.key, pattern)
    return RegexConstraint(compiled.get(key, lambda: RegexMachine(vocabulary, pattern)))
