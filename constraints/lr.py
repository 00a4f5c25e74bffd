"""LR tables: LALR(1) first, canonical LR(1) where LALR would see a conflict that LR(1) does not have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from constraints.errors import ConstraintError
from constraints.yacc_grammar import Grammar, Production

END = -1
"""The terminal that stands for the end of the text."""
ACCEPT = 0
"""Reducing production 0 accepts the text."""
MAX_STATES = 20_000
MAX_WORK = 2_000_000
"""Items looked at while the tables are made: bounds the time."""

Item = tuple[int, int]
"""A production, and how many of its symbols are read."""


@dataclass
class Tables:
    """What the parser does.

    `shift[state]` and `goto[state]` map a terminal or a rule to the next state; `reduce[state]` maps a
    terminal or END to the production to reduce.
    """

    shift: list[dict[int, int]]
    goto: list[dict[int, int]]
    reduce: list[dict[int, int]]
    productions: list[Production]
    ambiguous: bool = False
    """Whether a conflict was decided by yacc's order of preference: some texts are then lost."""


class _Sets:
    """Which rules may be empty, and the first terminals of symbols, as bit sets (bit 0 is END)."""

    def __init__(self, grammar: Grammar):
        self.by_rule: list[list[int]] = [[] for _ in grammar.rules]
        for number, production in enumerate(grammar.productions):
            self.by_rule[production.rule].append(number)
        self.empty = [False] * len(grammar.rules)
        self.first = [0] * len(grammar.rules)
        changed = True
        while changed:
            changed = False
            for production in grammar.productions:
                bits, empty = self.of(production.symbols)
                rule = production.rule
                if bits | self.first[rule] != self.first[rule] or (empty and not self.empty[rule]):
                    self.first[rule] |= bits
                    self.empty[rule] |= empty
                    changed = True

    def of(self, symbols: Iterable[int]) -> tuple[int, bool]:
        """The first terminals of `symbols` in a row, and whether all of them may be empty."""
        bits = 0
        for symbol in symbols:
            if symbol < 0:
                return bits | 2 << ~symbol, False
            bits |= self.first[symbol]
            if not self.empty[symbol]:
                return bits, False
        return bits, True


def make_tables(grammar: Grammar) -> Tables:
    """The tables of `grammar`. `ConstraintError` for a useless grammar, or one too large.

    Conflicts that are left in canonical LR(1) are decided by precedence, then as yacc does: shift before
    reduce, the earlier production before the later.
    """
    _check_productive(grammar)
    sets = _Sets(grammar)
    tables = _Builder(grammar, sets, merge=True).tables()
    if not tables.ambiguous:
        return tables
    try:
        return _Builder(grammar, sets, merge=False).tables()
    except _TooLarge:
        return tables


def _check_productive(grammar: Grammar) -> None:
    """Every rule that can be reached must describe some text."""
    known: set[int] = set()
    while True:
        more = {
            p.rule
            for p in grammar.productions
            if p.rule not in known and all(s < 0 or s in known for s in p.symbols)
        }
        if not more:
            break
        known |= more
    for production in grammar.productions:
        for symbol in (production.rule, *production.symbols):
            if symbol >= 0 and symbol not in known:
                name = grammar.rules[symbol] if symbol else grammar.rules[grammar.productions[0].symbols[0]]
                raise ConstraintError(
                    f"yacc grammar: rule {name} describes no text, it only refers to itself"
                )


class _TooLarge(ConstraintError):
    pass


class _Builder:
    """One table construction: LALR(1) when `merge`, else canonical LR(1)."""

    def __init__(self, grammar: Grammar, sets: _Sets, merge: bool):
        self.grammar = grammar
        self.sets = sets
        self.merge = merge
        self.kernels: list[dict[Item, int]] = []
        self.numbers: dict[object, int] = {}
        self.moves: list[dict[int, int]] = []
        self.work = 0
        self._build()

    def _name(self, kernel: dict[Item, int]) -> object:
        return frozenset(kernel) if self.merge else frozenset(kernel.items())

    def _build(self) -> None:
        start: dict[Item, int] = {(0, 0): 1}
        self.numbers[self._name(start)] = 0
        self.kernels.append(start)
        self.moves.append({})
        queue = [0]
        waiting = {0}
        while queue:
            number = queue.pop()
            waiting.discard(number)
            for symbol, kernel in self._successors(self.kernels[number]).items():
                target, changed = self._place(kernel)
                self.moves[number][symbol] = target
                if changed and target not in waiting:
                    queue.append(target)
                    waiting.add(target)

    def _place(self, kernel: dict[Item, int]) -> tuple[int, bool]:
        """The state of `kernel`, and whether it has to be looked at (again)."""
        name = self._name(kernel)
        number = self.numbers.get(name)
        if number is None:
            number = self.numbers[name] = len(self.kernels)
            if number >= MAX_STATES:
                raise _TooLarge(f"yacc grammar: its table needs more than {MAX_STATES} states")
            self.kernels.append(kernel)
            self.moves.append({})
            return number, True
        known = self.kernels[number]
        changed = False
        for item, ahead in kernel.items():
            if ahead & ~known[item]:
                known[item] |= ahead
                changed = True
        return number, changed

    def _closure(self, kernel: dict[Item, int]) -> dict[Item, int]:
        """All items of a state with the terminals that may follow each."""
        items = dict(kernel)
        queue = list(items)
        while queue:
            self.work += 1
            if self.work > MAX_WORK:
                raise _TooLarge("yacc grammar: its table takes too long to make; use fewer rules")
            production, place = item = queue.pop()
            symbols = self.grammar.productions[production].symbols
            if place == len(symbols) or symbols[place] < 0:
                continue
            ahead, empty = self.sets.of(symbols[place + 1 :])
            if empty:
                ahead |= items[item]
            for new in self.sets.by_rule[symbols[place]]:
                known = items.get((new, 0))
                if known is None or ahead & ~known:
                    items[new, 0] = ahead | (known or 0)
                    queue.append((new, 0))
        return items

    def _successors(self, kernel: dict[Item, int]) -> dict[int, dict[Item, int]]:
        found: dict[int, dict[Item, int]] = {}
        for (production, place), ahead in self._closure(kernel).items():
            symbols = self.grammar.productions[production].symbols
            if place < len(symbols):
                found.setdefault(symbols[place], {})[production, place + 1] = ahead
        return found

    def tables(self) -> Tables:
        tables = Tables([], [], [], self.grammar.productions)
        for number, kernel in enumerate(self.kernels):
            shift = {~symbol: to for symbol, to in self.moves[number].items() if symbol < 0}
            reduce: dict[int, int] = {}
            for (production, place), ahead in self._closure(kernel).items():
                if place == len(self.grammar.productions[production].symbols):
                    for terminal in _terminals(ahead):
                        tables.ambiguous |= self._decide(terminal, production, shift, reduce)
            tables.shift.append(shift)
            tables.goto.append({symbol: to for symbol, to in self.moves[number].items() if symbol >= 0})
            tables.reduce.append(reduce)
        return tables

    def _decide(self, terminal: int, production: int, shift: dict[int, int], reduce: dict[int, int]) -> bool:
        """Enter a reduction on `terminal`; True when it met another action and yacc's order decided."""
        if terminal in reduce:
            reduce[terminal] = min(reduce[terminal], production)
            return True
        if terminal not in shift:
            reduce[terminal] = production
            return False
        mine = self.grammar.productions[production].precedence
        theirs = self.grammar.precedence.get(terminal)
        if mine is None or theirs is None:
            return True
        if mine[0] > theirs[0] or (mine[0] == theirs[0] and theirs[1] == "left"):
            del shift[terminal]
            reduce[terminal] = production
        elif mine[0] == theirs[0] and theirs[1] == "nonassoc":
            del shift[terminal]
        return False


def _terminals(bits: int) -> list[int]:
    return [place - 1 for place in range(bits.bit_length()) if bits >> place & 1]
