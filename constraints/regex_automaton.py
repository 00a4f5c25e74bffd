"""The byte automaton of a regex, with names for its states that hold in every process."""

from __future__ import annotations

from hashlib import blake2b

from constraints import regex_syntax
from constraints.automaton import Alt, Automaton, Bytes, Cat, Repeat, Term, flat, split, utf8
from constraints.regex_syntax import Ranges, Tree

MAX_TERMS = 256
"""Ways in which a text may be read at once: a byte then costs half a millisecond."""
MAX_NEW_TERMS = 50_000
MAX_SHARED = 32
"""Characters that options are compared by, from their beginning."""


class RegexAutomaton(Automaton):
    """The automaton of one syntax tree."""

    max_terms = MAX_TERMS
    max_new_terms = MAX_NEW_TERMS

    def __init__(self, tree: Tree):
        super().__init__()
        self._digests: dict[Term, bytes] = {}
        self._classes: dict[Ranges, Term] = {}
        term = self._lower(tree, self.epsilon)
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
                self._digests[part] = blake2b(self._content(part), digest_size=16).digest()
        return self._digests[term]

    def _content(self, term: Term) -> bytes:
        if isinstance(term, Cat):
            return b"cat" + self._term_digest(term.head) + self._digests[term.tail]
        if isinstance(term, Alt):
            return b"alt" + b"".join(map(self._term_digest, term.options))
        if isinstance(term, Repeat):
            return b"repeat" + self._term_digest(term.body) + f"{term.low},{term.high}".encode()
        return f"bytes{term.sequences}".encode() if isinstance(term, Bytes) else b"epsilon"

    def _lower(self, tree: Tree, tail: Term) -> Term | None:
        """The term of `tree` and then `tail`; None when it matches no text."""
        match tree:
            case regex_syntax.Chars(ranges):
                return self.cat(self._class(ranges), tail) if ranges else None
            case regex_syntax.Cat(parts):
                term: Term | None = tail
                for part in reversed(parts):
                    if term is not None:
                        term = self._lower(part, term)
                return term
            case regex_syntax.Alt(options):
                lowered = [self._lower(option, self.epsilon) for option in options]
                found = [term for term in lowered if term is not None]
                return self.cat(self._either(found, MAX_SHARED), tail) if found else None
            case regex_syntax.Repeat(body, low, high):
                inner = self._lower(body, self.epsilon)
                if inner is None:
                    return tail if low == 0 else None
                return self.cat(self.repeat(inner, low, high), tail)

    def _class(self, ranges: Ranges) -> Term:
        known = self._classes.get(ranges)
        if known is None:
            known = self._classes[ranges] = self.sequences(utf8(ranges))
        return known

    def _either(self, options: list[Term], depth: int) -> Term:
        """Any of `options`. What several begin with is read once, so that a state has one term for them."""
        options = list(flat(options))
        shared: list[Term] = []
        while len(options) > 1 and len({split(option)[0] for option in options}) == 1:
            shared.append(split(options[0])[0])
            options = [split(option)[1] or self.epsilon for option in options]
        tails: dict[Term, list[Term]] = {}
        for option in options:
            head, tail = split(option)
            tails.setdefault(head, []).append(tail or self.epsilon)
        if depth and len(tails) < len(options):
            options = [self.cat(head, self._either(found, depth - 1)) for head, found in tails.items()]
        term = self.alt(options)
        for head in reversed(shared):
            term = self.cat(head, term)
        return term
