"""Regex constraints: an automaton of our own names the states, the fastest engine at hand fills in the masks."""

from __future__ import annotations

from llguidance import LLMatcher

from constraints import guidance, regex_syntax
from constraints.errors import ConstraintError
from constraints.machine import Machine, MachineConstraint, compiled
from constraints.regex_automaton import DEAD, RegexAutomaton
from constraints.token_set import Row
from constraints.vocabulary import Vocabulary


class RegexMachine(Machine[int]):
    """The states of one pattern over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, pattern: str):
        super().__init__(vocabulary)
        self.tree = regex_syntax.parse(pattern)
        if not regex_syntax.has_match(self.tree):
            raise ConstraintError(f"regex {regex_syntax.shown(pattern)} matches no text at all")
        self.automaton = RegexAutomaton(self.tree)
        source = f"start: /{regex_syntax.render(self.tree)}/{guidance.NO_FORCING}"
        self.fresh = guidance.matcher(vocabulary, source)

    @property
    def start(self) -> int:
        return self.automaton.start

    def step(self, state: int, text: bytes) -> int | None:
        after = self.automaton.step(state, text)
        return None if after == DEAD else after

    def accepts(self, state: int) -> bool:
        return self.automaton.accepts(state)

    def next_bytes(self, state: int) -> bytes:
        return bytes(byte for byte, after in enumerate(self.automaton.row(state)) if after != DEAD)

    def text_row(self, state: int, tokens: list[int]) -> Row:
        at = self.fresh.deep_copy()
        if not at.consume_tokens([token for token in tokens if not self.vocabulary.is_special(token)]):
            raise ConstraintError(guidance.first_line(at.get_error()))
        return guidance.compute_row(self.vocabulary, at)


class RegexConstraint(MachineConstraint[int]):
    """A position in a regex."""

    _matcher: LLMatcher | None = None


def regex(vocabulary: Vocabulary, pattern: str) -> MachineConstraint[int]:
    """Text that `pattern` matches from its first character to its last.

    `\\d \\w \\s` are ASCII, `.` is any character but a newline, `^` and `$` at the ends are redundant. The text is
    always UTF-8. Raises `ConstraintError` naming the place of what is wrong or not supported (look-around, back
    references, assertions), and for a pattern that is too large.
    """
    return RegexConstraint(
        compiled.get(("regex", vocabulary.key, pattern), lambda: RegexMachine(vocabulary, pattern))
    )
