"""Yacc constraints: lexemes that an LR parser accepts, with a mask per lexer state and top of the stack."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from constraints.automaton import DEAD
from constraints.errors import ConstraintError
from constraints.lexer import Lexer
from constraints.lr import ACCEPT, END, Sets, Tables, Work, make_tables, ones
from constraints.machine import MAX_STEPS, Machine, MachineConstraint, compiled
from constraints.token_set import Row, pack
from constraints.trie import Ints, trie_of
from constraints.vocabulary import Vocabulary
from constraints.yacc_grammar import Grammar, read_grammar

UNKNOWN = -2
MAX_CODES = 20_000
MAX_KEYS = 50_000
MAX_REDUCTIONS = 10_000
"""In a row, beside those that take what is on the stack."""
MAX_TOP = 64
"""Entries of a stack by which a mask is named; one that depends on more is named by the whole stack."""
MAX_STACKS = 50_000
STACKS_IN_A_STATE = 10
"""A stack takes some 0.3 KB, a tenth of what states are counted as."""


class Stack:
    """The parser's stack: its top, and the stack below. A machine makes each once, so many share the rest."""

    __slots__ = ("below", "depth", "state")

    def __init__(self, state: int, below: Stack | None = None):
        self.state = state
        self.below: Stack = self if below is None else below
        self.depth: int = 1 if below is None else below.depth + 1

    def top(self, count: int) -> tuple[int, ...]:
        """The uppermost `count` states, the top first."""
        found, at = [], self
        for _ in range(count):
            found.append(at.state)
            at = at.below
        return tuple(found)


State = tuple[Stack, int]
"""The parser's stack, and the state of the lexer inside the lexeme that is being read."""

Overlay = tuple[Stack, tuple[int, ...]]
"""A stack as one that is known and what is above it, the top last."""


class Reading:
    """A parser that reads on from one stack without changing it, and knows how deep it looked."""

    def __init__(self, tables: Tables, stack: Stack):
        self.tables = tables
        self.top: Overlay = stack, ()
        self.lowest = stack.depth

    def state(self, at: Overlay) -> int:
        """The state on top."""
        base, extra = at
        if extra:
            return extra[-1]
        self.lowest = min(self.lowest, base.depth - 1)
        return base.state

    def takes(self, at: Overlay, terminals: int) -> bool:
        """Whether the parser takes any of `terminals`, a bit set."""
        state = self.state(at)
        if terminals & self.tables.shifts[state]:
            return True
        # What it would neither shift nor reduce on is refused; a reduction has to be tried.
        return any(self.shift(at, t) is not None for t in ones(terminals & self.tables.reduces[state]))

    def shift(self, at: Overlay, terminal: int) -> Overlay | None:
        """The stack after `terminal`, None when the parser refuses it."""
        base, extra = at
        tables = self.tables
        for _ in range(MAX_REDUCTIONS + base.depth):
            state = self.state((base, extra))
            after = tables.shift[state].get(terminal)
            if after is not None:
                return base, (*extra, after)
            number = tables.reduce[state].get(terminal)
            if number is None or number == ACCEPT:
                return None
            base, extra = self._reduce(base, extra, number)
        return None

    def ends(self, at: Overlay, known: dict[Overlay, bool]) -> bool:
        """Whether the text may end. `known` is what was found out so far: a stack ends as those below do."""
        passed: list[Overlay] = []
        found: bool | None = False
        for _ in range(MAX_REDUCTIONS + at[0].depth):
            if (found := known.get(at)) is not None:
                break
            number = self.tables.reduce[self.state(at)].get(END)
            if number is None or number == ACCEPT:
                found = number == ACCEPT
                break
            passed.append(at)
            at = self._reduce(*at, number)
        if len(known) >= MAX_STEPS:
            known.clear()
        known.update(dict.fromkeys(passed, bool(found)))
        return bool(found)

    def _reduce(self, base: Stack, extra: tuple[int, ...], number: int) -> Overlay:
        production = self.tables.productions[number]
        length = len(production.symbols)
        if length <= len(extra):
            extra = extra[: len(extra) - length]
        else:
            for _ in range(length - len(extra)):
                base = base.below
            extra = ()
        below = self.state((base, extra))
        return base, (*extra, self.tables.goto[below][production.rule])


@dataclass
class Classes:
    """What the tokens do in one lexer state, whatever the parser thinks, grouped by what they do."""

    codes: list[int]
    counts: Ints
    tokens: NDArray[np.int64]
    """Tokens by code: counts[0] tokens of codes[0], then counts[1] of codes[1], ..."""


class Lexemes:
    """What tokens do to the lexer: the terminals they complete, one after another, and the state they end in.

    Both together have a number, a code. No token is looked at twice in one lexer state. One thread at a time.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar, lexer: Lexer):
        self.vocabulary = vocabulary
        self.lexer = lexer
        self.skipped = sum(1 << terminal for terminal in grammar.skipped)
        self._next_to = neighbours(grammar)
        self._clear()

    def _clear(self) -> None:
        # Node 0 is no terminal yet; a node is its parent and then one terminal.
        self.parent = [0]
        self.terminal = [-1]
        self._children: dict[tuple[int, int], int] = {}
        self.code: list[tuple[int, int]] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._table = np.full((64, 256), UNKNOWN, np.int32)
        self._classes: dict[int, Classes] = {}

    def classes(self, state: int) -> Classes:
        known = self._classes.get(state)
        if known is None:
            if len(self.code) > MAX_CODES:
                self._clear()
            known = self._classes[state] = self._classify(state)
        return known

    def _classify(self, state: int) -> Classes:
        found = trie_of(self.vocabulary).walk_by(self._step, self._number(0, state))
        tokens = np.flatnonzero(found >= 0)
        order = np.argsort(found[tokens], kind="stable")
        codes, counts = np.unique(found[tokens], return_counts=True)
        return Classes(codes.tolist(), counts.astype(np.int32), tokens[order])

    def _number(self, node: int, state: int) -> int:
        code = self._codes.setdefault((node, state), len(self.code))
        if code == len(self.code):
            self.code.append((node, state))
            if code == len(self._table):
                self._table = np.concatenate([self._table, np.full_like(self._table, UNKNOWN)])
        return code

    def _step(self, codes: Ints, texts: NDArray[np.uint8]) -> Ints:
        after = self._table[codes, texts]
        unknown = np.flatnonzero(after == UNKNOWN)
        if len(unknown):
            for key in np.unique(codes[unknown].astype(np.int64) * 256 + texts[unknown]).tolist():
                # Numbering the next code may move the table, so it comes first.
                node, state = self.code[key >> 8]
                following = self._move(node, state, key & 255)
                self._table[key >> 8, key & 255] = following
            after[unknown] = self._table[codes[unknown], texts[unknown]]
        return after

    def _move(self, node: int, state: int, byte: int) -> int:
        after = self.lexer.row(state)[byte]
        if after == DEAD:
            winner = self.lexer.winner[state]
            after = self.lexer.row(0)[byte]
            if winner < 0 or after == DEAD:
                return DEAD
            if not self.skipped >> winner & 1:
                if node and not self._next_to[self.terminal[node]] >> winner & 1:
                    return DEAD
                node = self._child(node, winner)
        # A lexeme that cannot stand after the terminal before it is dead in every state of the parser.
        possible = self._next_to[self.terminal[node]] if node else -1
        return self._number(node, after) if self.lexer.reachable[after] & (possible | self.skipped) else DEAD

    def _child(self, node: int, terminal: int) -> int:
        child = self._children.setdefault((node, terminal), len(self.parent))
        if child == len(self.parent):
            self.parent.append(node)
            self.terminal.append(terminal)
        return child


def neighbours(grammar: Grammar) -> list[int]:
    """For every terminal the terminals that may come right after it in some text, as a bit set."""
    first, last = Sets(grammar), Sets(grammar.mirrored())
    found = [0] * len(grammar.terminals)
    after_rule = [0] * len(grammar.rules)
    for production in grammar.productions:
        after = 0
        for symbol in reversed(production.symbols):
            if symbol < 0:
                found[~symbol] |= after
                after = 1 << ~symbol
            else:
                after_rule[symbol] |= after
                after = first.first[symbol] >> 1 | (after if first.empty[symbol] else 0)
    work = Work()
    for rule, after in enumerate(after_rule):
        ends = ones(last.first[rule] >> 1)
        work.look(len(ends))
        for terminal in ends:
            found[terminal] |= after
    return found


class YaccMachine(Machine[State]):
    """One grammar over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, text: str):
        super().__init__(vocabulary)
        grammar = read_grammar(text)
        if not grammar.terminals:
            raise ConstraintError("yacc grammar: there is no terminal")
        self.tables = make_tables(grammar)
        self.lexer = Lexer(grammar.terminals)
        self.lexemes = Lexemes(vocabulary, grammar, self.lexer)
        self._bottom = Stack(0)
        self._stacks: dict[tuple[Stack, int], Stack] = {}
        # By lexer state and depth: the tops of stacks whose masks depend on no more than them.
        self._keys: dict[int, dict[int, set[tuple[int, ...]]]] = {}
        self._num_keys = 0
        self._names: dict[State, Hashable] = {}
        self._ends: dict[Overlay, bool] = {}
        self._fresh: tuple[State | None, Row] = None, np.empty(0, np.int32)
        self._lock = Lock()

    @property
    def start(self) -> State:
        return self._bottom, 0

    def num_states(self) -> int:
        fixed = len(self.lexer) + len(self.lexemes.code) + len(self.tables.shift)
        return fixed + len(self._stacks) // STACKS_IN_A_STATE

    def forget(self) -> None:
        super().forget()
        self._names.clear()
        self._ends.clear()
        self._stacks.clear()
        if self.places is not None:
            self.places.clear()

    def step(self, state: State, text: bytes) -> State | None:
        stack, lexer_state = state
        lexer = self.lexer
        reading = Reading(self.tables, stack)
        at = reading.top
        for byte in text:
            after = lexer.row(lexer_state)[byte]
            if after == DEAD:
                closed = self._close(reading, at, lexer_state)
                after = lexer.row(0)[byte]
                if closed is None or after == DEAD:
                    return None
                at = closed
            lexer_state = after
        # A lexeme that has become hopeless stays so, hence one look at the end is enough.
        return (self._whole(at), lexer_state) if self._hopeful(reading, at, lexer_state) else None

    def _whole(self, at: Overlay) -> Stack:
        stack, extra = at
        for state in extra:
            known = self._stacks.get((stack, state))
            if known is None:
                if len(self._stacks) >= MAX_STACKS:
                    # Who stands on one stands well: equal stacks may be two then, which is only too fine.
                    self.forget()
                known = self._stacks.setdefault((stack, state), Stack(state, stack))
            stack = known
        return stack

    def _close(self, reading: Reading, at: Overlay, lexer_state: int) -> Overlay | None:
        """The stack after the lexeme that ends in `lexer_state`."""
        winner = self.lexer.winner[lexer_state]
        if winner < 0:
            return None
        return at if self.lexemes.skipped >> winner & 1 else reading.shift(at, winner)

    def _hopeful(self, reading: Reading, at: Overlay, lexer_state: int) -> bool:
        """Whether the lexeme may still become something that the parser takes."""
        reachable = self.lexer.reachable[lexer_state]
        if reachable & self.lexemes.skipped:
            return True
        return reading.takes(at, reachable)

    def accepts(self, state: State) -> bool:
        stack, lexer_state = state
        reading = Reading(self.tables, stack)
        closed = self._close(reading, reading.top, lexer_state)
        return closed is not None and reading.ends(closed, self._ends)

    def next_bytes(self, state: State) -> bytes:
        stack, lexer_state = state
        reading = Reading(self.tables, stack)
        closed = self._close(reading, reading.top, lexer_state)
        hopeful: dict[tuple[bool, int], bool] = {}
        found = bytearray()
        for byte, after in enumerate(self.lexer.row(lexer_state)):
            at, ends = reading.top, after == DEAD
            if ends:
                after = self.lexer.row(0)[byte]
                if closed is None or after == DEAD:
                    continue
                at = closed
            if (ends, after) not in hopeful:
                hopeful[ends, after] = self._hopeful(reading, at, after)
            if hopeful[ends, after]:
                found.append(byte)
        return bytes(found)

    def state_key(self, state: State) -> Hashable:
        """As much of the stack as the mask depends on: how much that is, making the mask tells."""
        known = self._names.get(state)
        if known is None:
            if len(self._names) >= MAX_STEPS:
                self._names.clear()
            # The engine's thread and a script's may ask at once, and both would number the codes of lexemes.
            with self._lock:
                known = self._names[state] = *self._decisive(*state), self.accepts(state)
        return known

    def _decisive(self, stack: Stack, lexer_state: int) -> tuple[int, tuple[int, ...] | Stack]:
        for depth, known in self._keys.get(lexer_state, {}).items():
            if depth <= stack.depth and (top := stack.top(depth)) in known:
                return lexer_state, top
        if self._num_keys >= MAX_KEYS:
            self._keys, self._num_keys = {}, 0
        row, depth = self._evaluate(stack, lexer_state)
        self._fresh = (stack, lexer_state), row
        if depth > MAX_TOP:
            return lexer_state, stack
        top = stack.top(depth)
        self._keys.setdefault(lexer_state, {}).setdefault(depth, set()).add(top)
        self._num_keys += 1
        return lexer_state, top

    def text_row(self, state: State, tokens: list[int]) -> Row:
        fresh, row = self._fresh
        if fresh == state:
            return row.copy()
        with self._lock:
            return self._evaluate(*state)[0]

    def _evaluate(self, stack: Stack, lexer_state: int) -> tuple[Row, int]:
        """The mask of a state, and how many entries from the top of the stack decide it."""
        classes = self.lexemes.classes(lexer_state)
        reading = Reading(self.tables, stack)
        after: dict[int, Overlay | None] = {0: reading.top}
        verdicts: dict[tuple[int, int], bool] = {}
        passed = np.zeros(len(classes.codes), bool)
        for place, code in enumerate(classes.codes):
            passed[place] = self._passes(reading, after, verdicts, *self.lexemes.code[code])
        ids = classes.tokens[np.repeat(passed, classes.counts)]
        return pack(ids, self.vocabulary.size), stack.depth - reading.lowest or 1

    def _passes(
        self,
        reading: Reading,
        after: dict[int, Overlay | None],
        verdicts: dict[tuple[int, int], bool],
        node: int,
        lexer_state: int,
    ) -> bool:
        at = self._after(reading, after, node)
        if at is None:
            return False
        reachable = self.lexer.reachable[lexer_state]
        if reachable & self.lexemes.skipped:
            return True
        verdict = verdicts.get((node, reachable))
        if verdict is None:
            verdict = verdicts[node, reachable] = reading.takes(at, reachable)
        return verdict

    def _after(self, reading: Reading, after: dict[int, Overlay | None], node: int) -> Overlay | None:
        """The stack after the terminals of `node`."""
        if node not in after:
            below = self._after(reading, after, self.lexemes.parent[node])
            after[node] = None if below is None else reading.shift(below, self.lexemes.terminal[node])
        return after[node]


def yacc(vocabulary: Vocabulary, grammar: str) -> MachineConstraint[State]:
    """Text of an LR(1) grammar: `%start R`, `%%`, rules `A: x | y ;`, terminals `"keyword"` and `"/regex/"`.

    The terminals of rule SKIP may stand between all others. A lexeme is as long as it can be, and the byte
    after it must begin the next; literals win over regexes, longer ones first. The text may end where the
    last lexeme is complete and the grammar allows it, never before the first. Raises `ConstraintError` with
    line and column of what is wrong.
    """
    if not isinstance(grammar, str):
        raise ConstraintError(f"a yacc grammar is a string, not {type(grammar).__name__}")
    return MachineConstraint(
        compiled.get(("yacc", vocabulary.key, grammar), lambda: YaccMachine(vocabulary, grammar))
    )
