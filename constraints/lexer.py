"""The lexer of a grammar: all terminals as one byte automaton, built state by state."""

from __future__ import annotations

from threading import Lock

from constraints import regex_syntax
from constraints.automaton import DEAD
from constraints.errors import ConstraintError
from constraints.regex_automaton import RegexAutomaton
from constraints.regex_syntax import Tree
from constraints.yacc_grammar import Terminal

Alive = tuple[tuple[int, int], ...]
"""The terminals that a lexeme may still become, each with the state of its automaton."""


class Lexer:
    """States are ints, 0 the start of a lexeme.

    `winner[state]` is the terminal of a lexeme that ends there, -1 for none; `reachable[state]` is a bit set
    of the terminals that it may become.
    """

    def __init__(self, terminals: list[Terminal]):
        self.automata = [RegexAutomaton(_tree(terminal)) for terminal in terminals]
        # Literals before regexes, longer source text first, then the order of the grammar.
        ranked = sorted(
            range(len(terminals)), key=lambda i: (terminals[i].is_regex, -len(terminals[i].text), i)
        )
        self._rank = {terminal: place for place, terminal in enumerate(ranked)}
        self._states: list[Alive] = []
        self._numbers: dict[Alive, int] = {}
        self._rows: list[list[int] | None] = []
        self.winner: list[int] = []
        self.reachable: list[int] = []
        self._lock = Lock()
        self._number(tuple((i, automaton.start) for i, automaton in enumerate(self.automata)))
        if self.winner[0] >= 0:
            raise ConstraintError(
                f"yacc grammar: terminal {terminals[self.winner[0]]} matches the empty text"
            )

    def __len__(self) -> int:
        return len(self._states)

    def row(self, state: int) -> list[int]:
        """The next state of the lexeme for each byte, DEAD where the lexeme ends before it."""
        known = self._rows[state]
        if known is None:
            # A script's thread may step a grammar that the engine's thread steps too.
            with self._lock:
                known = self._rows[state] = self._rows[state] or self._expand(self._states[state])
        return known

    def _expand(self, state: Alive) -> list[int]:
        terminals = [terminal for terminal, _ in state]
        columns = list(zip(*(self.automata[terminal].row(at) for terminal, at in state), strict=True))
        # Most bytes do what others do, so each thing that they do is looked at once.
        numbers: dict[tuple[int, ...], int] = {}
        for column in columns:
            if column not in numbers:
                after = tuple((t, at) for t, at in zip(terminals, column, strict=True) if at != DEAD)
                numbers[column] = self._number(after) if after else DEAD
        return [numbers[column] for column in columns]

    def _number(self, state: Alive) -> int:
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = len(self._states)
            self._states.append(state)
            self._rows.append(None)
            complete = [terminal for terminal, at in state if self.automata[terminal].accepts(at)]
            self.winner.append(min(complete, key=self._rank.__getitem__, default=-1))
            self.reachable.append(sum(1 << terminal for terminal, _ in state))
        return number


def _tree(terminal: Terminal) -> Tree:
    if not terminal.is_regex:
        return regex_syntax.Cat(tuple(regex_syntax.Chars(regex_syntax.of_chars(c)) for c in terminal.text))
    try:
        tree = regex_syntax.parse(terminal.text)
    except ConstraintError as error:
        raise ConstraintError(f"yacc grammar: in terminal {terminal}: {error}") from None
    if not regex_syntax.has_match(tree):
        raise ConstraintError(f"yacc grammar: terminal {terminal} matches no text")
    return tree
