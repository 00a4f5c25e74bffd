"""The byte automaton of a regex, with names for its states that hold in every process."""

from __future__ import annotations

from hashlib import blake2b

from constraints import regex_syntax
from constraints.automaton import Alt, Automaton, Bytes, Cat, Repeat, Term, utf8
from constraints.regex_syntax import Tree


class RegexAutomaton(Automaton):
    """The automaton of one syntax tree."""

    def __init__(self, tree: Tree):
        super().__init__()
        self._digests: dict[Term, bytes] = {}
        term = self._lower(tree)
        self._number([term] if term else [])

    def digest(self, state: int) -> bytes:
        """16 bytes that name `state` in every process: equal exactly for equal sets of terms."""
        names = sorted(self._term_digest(term) for term in self._states[state])
        return blake2b(b"".join(names), digest_size=16).digest()

    def _term_digest(self, term: Term) -> bytes:
        rest, waiting = term, [term]
        while isinstance(rest, Cat):
            rest = rest.tail
            waiting.append(rest)
        # A long pattern is a long chain, so tails are named before what stands before them.
        for part in reversed(waiting):
            if part not in self._digests:
                self._digests[part] = blake2b(repr(self._content(part)).encode(), digest_size=16).digest()
        return self._digests[term]

    def _content(self, term: Term) -> tuple[object, ...]:
        if isinstance(term, Cat):
            return "cat", self._term_digest(term.head), self._digests[term.tail]
        if isinstance(term, Alt):
            return "alt", *map(self._term_digest, term.options)
        if isinstance(term, Repeat):
            return "repeat", self._term_digest(term.body), term.low, term.high
        return ("bytes", term.sequences) if isinstance(term, Bytes) else ("epsilon",)

    def _lower(self, tree: Tree) -> Term | None:
        """The term of `tree`; None when it matches no text."""
        match tree:
            case regex_syntax.Chars(ranges):
                return self.sequences(utf8(ranges)) if ranges else None
            case regex_syntax.Cat(parts):
                term = self.epsilon
                for part in reversed(parts):
                    lowered = self._lower(part)
                    if lowered is None:
                        return None
                    term = self.cat(lowered, term)
                return term
            case regex_syntax.Alt(options):
                found = [term for term in map(self._lower, options) if term is not None]
                return self.alt(found) if found else None
            case regex_syntax.Repeat(body, low, high):
                lowered = self._lower(body)
                if lowered is None:
                    return self.epsilon if low == 0 else None
                return self.repeat(lowered, low, high)
