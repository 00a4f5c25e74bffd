"""A grammar matcher for the tests: Earley's parser over lexemes that `RegexOracle`s cut from the text."""

from __future__ import annotations

import re
from functools import cache

from tests.constraints.regex_oracle import RegexOracle

Rules = dict[str, list[list[str]]]
"""Bodies by rule. A symbol in quotes is a terminal: "'kw'" a literal, "'/rx/'" a regex."""


def is_terminal(symbol: str) -> bool:
    return symbol[0] in "'\""


class GrammarOracle:
    """The first rule is the start. Rule SKIP lists terminals that may stand anywhere."""

    def __init__(self, rules: Rules):
        self.skipped = {body[0] for body in rules.get("SKIP", [])}
        self.rules = {name: bodies for name, bodies in rules.items() if name != "SKIP"}
        self.start = next(iter(self.rules))
        used = {s for bodies in self.rules.values() for body in bodies for s in body if is_terminal(s)}
        self.terminals = {t: RegexOracle(self._pattern(t)) for t in used | self.skipped}
        self.next = cache(self._next)

    @staticmethod
    def _is_regex(terminal: str) -> bool:
        return len(terminal) > 4 and terminal[1] == terminal[-2] == "/"

    def _pattern(self, terminal: str) -> str:
        return terminal[2:-2] if self._is_regex(terminal) else re.escape(terminal[1:-1])

    def _winner(self, lexeme: bytes) -> str | None:
        found = [t for t, oracle in self.terminals.items() if oracle.matches(lexeme)]
        return min(found, key=lambda t: (self._is_regex(t), -len(t)), default=None)

    def _lexemes(self, text: bytes) -> tuple[list[bytes], bytes] | None:
        """The lexemes that are finished, and the one being read."""
        done, start = [], 0
        for end in range(1, len(text) + 1):
            if not self._alive(text[start:end]):
                if (
                    end - 1 == start
                    or self._winner(text[start : end - 1]) is None
                    or not self._alive(text[end - 1 : end])
                ):
                    return None
                done.append(text[start : end - 1])
                start = end - 1
        return done, text[start:]

    def _alive(self, lexeme: bytes) -> set[str]:
        return {t for t, oracle in self.terminals.items() if oracle.viable(lexeme)}

    def _read(self, lexemes: list[bytes]) -> tuple[str, ...] | None:
        """The terminals of `lexemes`, None when the parser refuses one."""
        read: tuple[str, ...] = ()
        for lexeme in lexemes:
            terminal = self._winner(lexeme)
            if terminal in self.skipped:
                continue
            if terminal not in self.next(read)[0]:
                return None
            read = (*read, terminal)
        return read

    def viable(self, text: bytes) -> bool:
        parts = self._lexemes(text)
        read = None if parts is None else self._read(parts[0])
        if parts is None or read is None:
            return False
        return not text or bool(self._alive(parts[1]) & (self.next(read)[0] | self.skipped))

    def ends(self, text: bytes) -> bool:
        parts = self._lexemes(text)
        if not text or parts is None or self._winner(parts[1]) is None:
            return False
        read = self._read([*parts[0], parts[1]])
        return read is not None and self.next(read)[1]

    def _next(self, read: tuple[str, ...]) -> tuple[set[str], bool]:
        """The terminals that may follow `read`, and whether it is a whole text of the grammar."""
        columns: list[set[tuple[str, tuple[str, ...], int, int]]] = [set() for _ in range(len(read) + 1)]
        columns[0] = {(self.start, tuple(body), 0, 0) for body in self.rules[self.start]}
        for place, column in enumerate(columns):
            while True:
                more = set()
                for name, body, dot, origin in column:
                    if dot == len(body):
                        more |= {
                            (n, b, d + 1, o) for n, b, d, o in columns[origin] if d < len(b) and b[d] == name
                        }
                    elif not is_terminal(body[dot]):
                        more |= {(body[dot], tuple(b), 0, place) for b in self.rules[body[dot]]}
                if more <= column:
                    break
                column |= more
            if place < len(read):
                columns[place + 1] = {
                    (n, b, d + 1, o) for n, b, d, o in column if d < len(b) and b[d] == read[place]
                }
        last = columns[-1]
        follow = {b[d] for _, b, d, _ in last if d < len(b) and is_terminal(b[d])}
        return follow, any(n == self.start and d == len(b) and o == 0 for n, b, d, o in last)


def as_yacc(rules: Rules) -> str:
    """The text of a grammar in the language of `yacc`."""
    start = next(name for name in rules if name != "SKIP")
    bodies = "\n".join(
        f"{name} : {' | '.join(' '.join(body) for body in options)} ;" for name, options in rules.items()
    )
    return f"%start {start}\n%%\n{bodies}\n"
