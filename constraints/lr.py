"""LR tables: LALR(1) first, canonical LR(1) where LALR may see a conflict that LR(1) does not have.

The lookaheads of LALR(1) are those of DeRemer and Pennello: what may follow a rule where it was begun, found
without ever listing the items of a state with their lookaheads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from constraints.errors import ConstraintError
from constraints.yacc_grammar import Grammar, Production

END = -1
"""The terminal that stands for the end of the text."""
ACCEPT = 0
"""Reducing production 0 accepts the text."""
MAX_STATES = 20_000
MAX_WORK = 400_000
"""Items looked at while the tables are made: bounds the time to a second or so."""

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

    @cached_property
    def shifts(self) -> list[int]:
        """The terminals that each state shifts, as bits."""
        return [sum(1 << terminal for terminal in found) for found in self.shift]

    @cached_property
    def reduces(self) -> list[int]:
        """The terminals on which each state reduces, as bits."""
        return [sum(1 << terminal for terminal in found if terminal >= 0) for found in self.reduce]


class Sets:
    """Which rules may be empty, and the first terminals of symbols, as bit sets (bit 0 is END)."""

    def __init__(self, grammar: Grammar):
        self.by_rule: list[list[int]] = [[] for _ in grammar.rules]
        for number, production in enumerate(grammar.productions):
            self.by_rule[production.rule].append(number)
        self.empty = _described(grammar, terminals=False)
        self.first = [0] * len(grammar.rules)
        feeds: list[list[int]] = [[] for _ in grammar.rules]
        for production in grammar.productions:
            for symbol in production.symbols:
                if symbol < 0:
                    self.first[production.rule] |= 2 << ~symbol
                    break
                feeds[symbol].append(production.rule)
                if not self.empty[symbol]:
                    break
        _spread(self.first, feeds, Work())

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


def _described(grammar: Grammar, terminals: bool) -> list[bool]:
    """By rule, whether it describes some text; without `terminals`, whether the empty one."""
    users: list[list[int]] = [[] for _ in grammar.rules]
    missing: list[int] = []
    found = [False] * len(grammar.rules)
    queue = []
    for number, production in enumerate(grammar.productions):
        missing.append(sum(symbol >= 0 or not terminals for symbol in production.symbols))
        for symbol in production.symbols:
            if symbol >= 0:
                users[symbol].append(number)
        if not missing[number]:
            queue.append(production.rule)
    while queue:
        rule = queue.pop()
        if found[rule]:
            continue
        found[rule] = True
        for number in users[rule]:
            missing[number] -= 1
            if not missing[number]:
                queue.append(grammar.productions[number].rule)
    return found


def make_tables(grammar: Grammar) -> Tables:
    """The tables of `grammar`. `ConstraintError` for a useless grammar, or one too large.

    Conflicts that are left in canonical LR(1) are decided by precedence, then as yacc does: shift before
    reduce, the earlier production before the later.
    """
    _check_productive(grammar)
    sets = Sets(grammar)
    made, choices = _Lalr(grammar, sets).tables()
    if not choices:
        return made
    # Only between two reductions can LALR(1) see a conflict that LR(1) does not have.
    try:
        return _Canonical(grammar, sets).tables()
    except _TooLarge:
        return made


def _check_productive(grammar: Grammar) -> None:
    """Every rule that can be reached must describe some text."""
    known = _described(grammar, terminals=True)
    for production in grammar.productions:
        for symbol in (production.rule, *production.symbols):
            if symbol >= 0 and not known[symbol]:
                name = grammar.rules[symbol] if symbol else grammar.rules[grammar.productions[0].symbols[0]]
                raise ConstraintError(
                    f"yacc grammar: rule {name} describes no text, it only refers to itself"
                )


class _TooLarge(ConstraintError):
    pass


class Work:
    """A bound on what is done for one grammar."""

    def __init__(self) -> None:
        self.done = 0.0

    def look(self, times: int) -> None:
        """Count what takes an eighth of the time of an item, `times` times."""
        self.count((1 + times) / 8)

    def count(self, work: float) -> None:
        """Count items. `ConstraintError` when there were too many."""
        self.done += work
        if self.done > MAX_WORK:
            raise _TooLarge("yacc grammar: its table takes too long to make; use fewer or shorter rules")


class _Builder(Work):
    """What both constructions share: the entry of reductions into the tables."""

    def __init__(self, grammar: Grammar, sets: Sets):
        super().__init__()
        self.grammar = grammar
        self.sets = sets
        self.moves: list[dict[int, int]] = []

    def new_state(self) -> int:
        if len(self.moves) >= MAX_STATES:
            raise _TooLarge(f"yacc grammar: its table needs more than {MAX_STATES} states")
        self.moves.append({})
        return len(self.moves) - 1

    def enter(self, reductions: list[list[tuple[int, int]]]) -> tuple[Tables, bool]:
        """The tables, given each state's productions to reduce with their lookaheads as bits.

        True when two reductions met in one place.
        """
        tables = Tables([], [], [], self.grammar.productions)
        choices = False
        for moves, found in zip(self.moves, reductions, strict=True):
            shift = {~symbol: to for symbol, to in moves.items() if symbol < 0}
            reduce: dict[int, int] = {}
            for production, ahead in found:
                self.look(4 * ahead.bit_count() + ahead.bit_length())
                for terminal in (place - 1 for place in ones(ahead)):
                    choices |= terminal in reduce
                    tables.ambiguous |= self._decide(terminal, production, shift, reduce)
            tables.shift.append(shift)
            tables.goto.append({symbol: to for symbol, to in moves.items() if symbol >= 0})
            tables.reduce.append(reduce)
        return tables, choices

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


class _Lalr(_Builder):
    """The LR(0) states, then for every rule begun in a state what may follow it there."""

    def __init__(self, grammar: Grammar, sets: Sets):
        super().__init__(grammar, sets)
        self.kernels: list[frozenset[Item]] = []
        self.begun = self._begun()
        self._make_states()

    def _begun(self) -> list[tuple[int, ...]]:
        """By rule, the rules that a text of it may begin with, itself included."""
        found: list[tuple[int, ...]] = []
        for rule in range(len(self.grammar.rules)):
            seen = {rule: None}
            queue = [rule]
            while queue:
                productions = self.sets.by_rule[queue.pop()]
                self.look(len(productions))
                for number in productions:
                    first = self.grammar.productions[number].symbols[:1]
                    if first and first[0] >= 0 and first[0] not in seen:
                        seen[first[0]] = None
                        queue.append(first[0])
            found.append(tuple(seen))
        return found

    def _make_states(self) -> None:
        numbers: dict[frozenset[Item], int] = {}

        def place(kernel: frozenset[Item]) -> int:
            if kernel not in numbers:
                numbers[kernel] = self.new_state()
                self.kernels.append(kernel)
            return numbers[kernel]

        place(frozenset({(0, 0)}))
        for state, kernel in enumerate(self.kernels):
            after: dict[int, set[Item]] = {}
            for production, at in self._items(kernel):
                symbols = self.grammar.productions[production].symbols
                if at < len(symbols):
                    after.setdefault(symbols[at], set()).add((production, at + 1))
            for symbol, items in after.items():
                self.moves[state][symbol] = place(frozenset(items))

    def _items(self, kernel: frozenset[Item]) -> list[Item]:
        items = list(kernel)
        rules: set[int] = set()
        for production, at in kernel:
            symbols = self.grammar.productions[production].symbols
            if at < len(symbols) and symbols[at] >= 0:
                rules.update(self.begun[symbols[at]])
        items += [(production, 0) for rule in sorted(rules) for production in self.sets.by_rule[rule]]
        self.count(len(items))
        return items

    def tables(self) -> tuple[Tables, bool]:
        """The tables; True when two reductions met in one place."""
        starts = [
            (state, symbol) for state, moves in enumerate(self.moves) for symbol in moves if symbol >= 0
        ]
        number = {start: place for place, start in enumerate(starts)}
        follow = [self._read_at_once(self.moves[state][rule]) for state, rule in starts]
        # `feeds[i]`: the places whose follow sets hold all of i's.
        feeds: list[list[int]] = [[] for _ in starts]
        for place, (state, rule) in enumerate(starts):
            after = self.moves[state][rule]
            self.look(len(self.moves[after]))
            for other in self.moves[after]:
                if other >= 0 and self.sets.empty[other]:
                    feeds[number[after, other]].append(place)
        _spread(follow, feeds, self)
        feeds = [[] for _ in starts]
        ends: list[dict[int, list[int]]] = [{} for _ in self.moves]
        for place, (state, rule) in enumerate(starts):
            for production in self.sets.by_rule[rule]:
                self._trace(place, state, production, number, feeds, ends)
        _spread(follow, feeds, self)
        reductions = [
            [(production, _union(follow, places)) for production, places in sorted(found.items())]
            for found in ends
        ]
        # The start production is begun nowhere: it is reduced at the end of the text.
        reductions[self.moves[0][self.grammar.productions[0].symbols[0]]].insert(0, (0, 1))
        return self.enter(reductions)

    def _read_at_once(self, state: int) -> int:
        """The terminals that `state` shifts, as bits; with END where the start rule is complete."""
        bits = sum(2 << ~symbol for symbol in self.moves[state] if symbol < 0)
        return bits | ((0, 1) in self.kernels[state])

    def _trace(
        self,
        place: int,
        state: int,
        production: int,
        number: dict[tuple[int, int], int],
        feeds: list[list[int]],
        ends: list[dict[int, list[int]]],
    ) -> None:
        """Follow `production`, begun in `state`: where it ends, and which rules in it may end it."""
        symbols = self.grammar.productions[production].symbols
        self.count(1 + len(symbols))
        path = [state]
        for symbol in symbols:
            path.append(self.moves[path[-1]][symbol])
        ends[path[-1]].setdefault(production, []).append(place)
        for at in range(len(symbols) - 1, -1, -1):
            if symbols[at] < 0:
                break
            feeds[place].append(number[path[at], symbols[at]])
            if not self.sets.empty[symbols[at]]:
                break


def _spread(bits: list[int], feeds: list[list[int]], work: Work) -> None:
    """Add each entry of `bits` to those that it feeds, until nothing changes."""
    queue = list(range(len(bits)))
    while queue:
        place = queue.pop()
        work.look(len(feeds[place]))
        for other in feeds[place]:
            if bits[place] & ~bits[other]:
                bits[other] |= bits[place]
                queue.append(other)


def _union(bits: list[int], places: list[int]) -> int:
    found = 0
    for place in places:
        found |= bits[place]
    return found


class _Canonical(_Builder):
    """Canonical LR(1): states differ in their lookaheads too."""

    def __init__(self, grammar: Grammar, sets: Sets):
        super().__init__(grammar, sets)
        self.closures: list[dict[Item, int]] = []
        numbers: dict[frozenset[tuple[Item, int]], int] = {}
        queue: list[dict[Item, int]] = []

        def place(kernel: dict[Item, int]) -> int:
            name = frozenset(kernel.items())
            if name not in numbers:
                numbers[name] = self.new_state()
                queue.append(kernel)
            return numbers[name]

        place({(0, 0): 1})
        for state, kernel in enumerate(queue):
            self.closures.append(self._closure(kernel))
            for symbol, after in self._successors(self.closures[-1]).items():
                self.moves[state][symbol] = place(after)

    def _closure(self, kernel: dict[Item, int]) -> dict[Item, int]:
        """All items of a state with the terminals that may follow each."""
        items = dict(kernel)
        queue = list(items)
        while queue:
            self.count(1)
            production, at = item = queue.pop()
            symbols = self.grammar.productions[production].symbols
            if at == len(symbols) or symbols[at] < 0:
                continue
            # Most of these looks are at what is known, and cost little.
            self.count((len(symbols) - at + len(self.sets.by_rule[symbols[at]])) / 32)
            ahead, empty = self.sets.of(symbols[at + 1 :])
            if empty:
                ahead |= items[item]
            for new in self.sets.by_rule[symbols[at]]:
                known = items.get((new, 0))
                if known is None or ahead & ~known:
                    items[new, 0] = ahead | (known or 0)
                    queue.append((new, 0))
        return items

    def _successors(self, closure: dict[Item, int]) -> dict[int, dict[Item, int]]:
        found: dict[int, dict[Item, int]] = {}
        for (production, at), ahead in closure.items():
            symbols = self.grammar.productions[production].symbols
            if at < len(symbols):
                found.setdefault(symbols[at], {})[production, at + 1] = ahead
        return found

    def tables(self) -> Tables:
        symbols = [production.symbols for production in self.grammar.productions]
        reductions = [
            [(number, ahead) for (number, at), ahead in closure.items() if at == len(symbols[number])]
            for closure in self.closures
        ]
        return self.enter(reductions)[0]


def ones(bits: int) -> list[int]:
    """Where `bits` has ones, ascending."""
    return [place for place, bit in enumerate(f"{bits:b}"[::-1]) if bit == "1"]
