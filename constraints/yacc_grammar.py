"""The grammar language of `yacc`: rules with inline terminals, no actions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from constraints.errors import ConstraintError

SKIP = "SKIP"
"""The rule whose terminals may stand anywhere and mean nothing."""
MAX_TEXT = 200_000
"""Characters of a grammar."""
MAX_GRAMMAR = 20_000
"""Symbols in all rules together."""

TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<mark>%%|[:;|])
      | (?P<directive>%[a-z-]+)
      | (?P<terminal>"[^"\n]*"|'[^'\n]*')
      | (?P<name>[A-Za-z_][A-Za-z0-9_.]*)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Terminal:
    """A literal or a regex."""

    text: str
    is_regex: bool

    def __str__(self) -> str:
        return f'"/{self.text}/"' if self.is_regex else f'"{self.text}"'


@dataclass(frozen=True)
class Production:
    """`name: symbols`. A symbol below zero is terminal ~symbol, others are rules."""

    rule: int
    symbols: tuple[int, ...]
    precedence: tuple[int, str] | None = None


@dataclass
class Grammar:
    """Numbered rules and terminals. Production 0 is the start rule alone."""

    rules: list[str] = field(default_factory=list)
    terminals: list[Terminal] = field(default_factory=list)
    productions: list[Production] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    precedence: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Level (higher binds tighter) and `left`, `right` or `nonassoc`, by terminal."""

    def mirrored(self) -> Grammar:
        """The grammar of the same texts from their end to their start."""
        turned = [Production(p.rule, p.symbols[::-1]) for p in self.productions]
        return Grammar(self.rules, self.terminals, turned)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


@dataclass
class _Rule:
    at: int
    bodies: list[tuple[list[_Token], _Token | None]]


def read_grammar(text: str) -> Grammar:
    """The grammar that `text` describes. `ConstraintError` with line and column of what is wrong."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str):
        if len(text) > MAX_TEXT:
            raise ConstraintError(
                f"yacc grammar: it has {len(text)} characters; {MAX_TEXT} are allowed, so use fewer or"
                " shorter rules"
            )
        self.text = text
        self.tokens = self._tokens()
        self.place = 0
        self.start: _Token | None = None
        self.levels: list[tuple[str, list[_Token]]] = []
        self.found: dict[str, _Rule] = {}

    def error(self, what: str, at: int) -> ConstraintError:
        line = self.text.count("\n", 0, at) + 1
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        return ConstraintError(f"yacc grammar, line {line}, column {column}: {what}")

    def _tokens(self) -> list[_Token]:
        found: list[_Token] = []
        at = 0
        while at < len(self.text):
            match = TOKEN.match(self.text, at)
            if match is None:
                raise self.error(f"unexpected {self.text[at]!r}", at)
            if match.lastgroup != "space":
                if len(found) >= MAX_GRAMMAR:
                    raise self.error(f"the grammar has more than {MAX_GRAMMAR} symbols", at)
                found.append(_Token(str(match.lastgroup), match[0], at))
            at = match.end()
        return [*found, _Token("end", "", len(self.text))]

    def _next(self) -> _Token:
        self.place += 1
        return self.tokens[self.place - 1]

    def _peek(self) -> _Token:
        return self.tokens[self.place]

    def read(self) -> Grammar:
        self._head()
        while self._peek().kind != "end" and self._peek().text != "%%":
            self._rule()
        if not self.found:
            raise self.error("there is no rule", len(self.text))
        return self._number()

    def _head(self) -> None:
        while (token := self._next()).text != "%%":
            if token.kind != "directive":
                raise self.error(
                    f"expected a declaration or '%%', found {token.text or 'the end'!r}", token.at
                )
            names = []
            while self._peek().kind in ("name", "terminal"):
                names.append(self._next())
            match token.text[1:]:
                case "start" if len(names) == 1:
                    self.start = names[0]
                case "left" | "right" | "nonassoc" as side:
                    self.levels.append((side, names))
                case "token":
                    pass
                case other:
                    raise self.error(f"declaration '%{other}' is not supported here", token.at)

    def _rule(self) -> None:
        name = self._next()
        if name.kind != "name":
            raise self.error(f"expected the name of a rule, found {name.text!r}", name.at)
        if (colon := self._next()).text != ":":
            raise self.error(f"expected ':' after {name.text}, found {colon.text!r}", colon.at)
        rule = self.found.setdefault(name.text, _Rule(name.at, []))
        while True:
            rule.bodies.append(self._body())
            mark = self._next()
            if mark.text == ";":
                return
            if mark.text != "|":
                raise self.error(f"expected '|' or ';' in rule {name.text}, found {mark.text!r}", mark.at)

    def _body(self) -> tuple[list[_Token], _Token | None]:
        symbols: list[_Token] = []
        precedence = None
        while (token := self._peek()).kind in ("name", "terminal", "directive"):
            self.place += 1
            if token.text == "%prec":
                precedence = self._peek()
                if precedence.kind not in ("name", "terminal"):
                    raise self.error("expected a terminal after '%prec'", precedence.at)
                self.place += 1
            elif token.kind == "directive" and token.text != "%empty":
                raise self.error(f"'{token.text}' is not supported in a rule", token.at)
            elif token.kind != "directive":
                symbols.append(token)
        return symbols, precedence

    def _number(self) -> Grammar:
        grammar = Grammar()
        names = [name for name in self.found if name != SKIP]
        rule_of = {name: number for number, name in enumerate(names, 1)}
        grammar.rules = ["$start", *names]
        terminal_of: dict[str, int] = {}

        def terminal(token: _Token) -> int:
            if token.text not in terminal_of:
                terminal_of[token.text] = len(grammar.terminals)
                grammar.terminals.append(self._terminal(token))
            return terminal_of[token.text]

        def symbol(token: _Token) -> int:
            if token.kind == "terminal":
                return ~terminal(token)
            if token.text not in rule_of:
                raise self.error(f"rule {token.text} is used but not defined", token.at)
            return rule_of[token.text]

        levels = {t.text: (level, side) for level, (side, ts) in enumerate(self.levels) for t in ts}
        start = self.start or _Token("name", names[0] if names else SKIP, 0)
        grammar.productions.append(Production(0, (symbol(start),)))
        for name in names:
            for body, precedence in self.found[name].bodies:
                # The last terminal of a production gives it its precedence.
                named = [t.text for t in body if t.kind == "terminal"][-1:]
                level = levels.get(precedence.text if precedence else named[0] if named else "")
                symbols = tuple(symbol(token) for token in body)
                grammar.productions.append(Production(rule_of[name], symbols, level))
        for body, _ in self.found[SKIP].bodies if SKIP in self.found else ():
            if len(body) != 1 or body[0].kind != "terminal":
                raise self.error("every body of SKIP must be one terminal", self.found[SKIP].at)
            grammar.skipped.add(terminal(body[0]))
        grammar.precedence = {number: levels[text] for text, number in terminal_of.items() if text in levels}
        self._check_skipped(grammar)
        return grammar

    def _check_skipped(self, grammar: Grammar) -> None:
        used = {~s for production in grammar.productions for s in production.symbols if s < 0}
        for number in used & grammar.skipped:
            what = f"{grammar.terminals[number]} is both skipped and used in a rule"
            raise self.error(what, self.found[SKIP].at)

    def _terminal(self, token: _Token) -> Terminal:
        text = token.text[1:-1]
        is_regex = len(text) > 2 and text.startswith("/") and text.endswith("/")
        if not text:
            raise self.error("a terminal cannot be empty; leave the body of the rule empty instead", token.at)
        return Terminal(text[1:-1] if is_regex else text, is_regex)
