"""`DynamicLexer`: any text in which every identifier is one that was added so far."""

from __future__ import annotations

import copy
import string
from collections.abc import Hashable
from typing import Any

import numpy as np

from constraints.errors import ConstraintError
from constraints.machine import Machine, MachineConstraint
from constraints.token_set import Row, pack
from constraints.trie import DEAD, Ints, trie_of
from constraints.vocabulary import Vocabulary

OUTSIDE = 0
UTF8_TAILS = 7
"""States 1 to 7: inside a character that is no letter of an identifier, by what its next bytes may be."""
OUTSIDE_STATES = 1 + UTF8_TAILS


def _outside_rows() -> Ints:
    """The bytes of text outside identifiers, as UTF-8: int32[8, 256]."""
    rows = np.full((OUTSIDE_STATES, 256), DEAD, np.int32)
    rows[OUTSIDE, :0x80] = OUTSIDE
    # States 1, 2, 3: so many bytes to come. 4 to 7: after E0, ED, F0, F4, where the next byte is narrower.
    rows[OUTSIDE, 0xC2:0xE0] = 1
    rows[OUTSIDE, 0xE1:0xF0] = 2
    rows[OUTSIDE, 0xF1:0xF4] = 3
    rows[OUTSIDE, [0xE0, 0xED, 0xF0, 0xF4]] = [4, 5, 6, 7]
    for state in (1, 2, 3):
        rows[state, 0x80:0xC0] = state - 1
    rows[4, 0xA0:0xC0] = rows[5, 0x80:0xA0] = 1
    rows[6, 0x90:0xC0] = rows[7, 0x80:0x90] = 2
    return rows


MAX_LETTERS = 256
"""Letters of one identifier."""
MAX_ALL_LETTERS = 8_000
"""Of one lexer: letters of its identifiers, beginnings that they share counted once. Each takes 1 KiB."""


class IdentifierMachine(Machine[int]):
    """States: outside an identifier, or a node in the tree of known ones. Nodes keep their numbers."""

    def __init__(self, vocabulary: Vocabulary, extra: str):
        super().__init__(vocabulary)
        self.places = None
        self.letters = frozenset((string.ascii_letters + string.digits + "_" + extra).encode())
        self.first_letters = self.letters - frozenset(string.digits.encode())
        self.version = 0
        self.shared = False
        """Whether lexers that were forked from one another use it, so that it must stay as it is."""
        self._rows = _outside_rows()
        for byte in self.first_letters:
            self._rows[OUTSIDE, byte] = DEAD
        self._complete: set[int] = set()
        self._used = len(self._rows)

    def add(self, identifier: bytes) -> None:
        node = known = 0
        while known < len(identifier) and (after := int(self._rows[node, identifier[known]])) != DEAD:
            node, known = after, known + 1
        # Before the first node is made: one that leads to no identifier would be a dead end.
        if self._used - OUTSIDE_STATES + len(identifier) - known > MAX_ALL_LETTERS:
            raise ConstraintError(
                f"identifier {identifier.decode()!r} is one too many: those of a lexer have "
                f"{MAX_ALL_LETTERS:,} letters at most in all, beginnings that they share counted once"
            )
        for byte in identifier[known:]:
            after = self._new_node()
            self._rows[node, byte] = after
            node = after
        if node in self._complete:
            return
        self._complete.add(node)
        outside = np.array([byte not in self.letters for byte in range(256)])
        self._rows[node, outside] = self._rows[OUTSIDE, outside]
        self.version += 1
        self.forget()

    def copy(self) -> IdentifierMachine:
        """A machine of its own with the same identifiers; states mean the same in both."""
        twin = IdentifierMachine(self.vocabulary, "")
        twin.letters, twin.first_letters, twin.version = self.letters, self.first_letters, self.version
        twin._rows, twin._complete, twin._used = self._rows.copy(), self._complete.copy(), self._used
        return twin

    def _new_node(self) -> int:
        if self._used == len(self._rows):
            self._rows = np.concatenate([self._rows, np.full_like(self._rows, DEAD)])
        self._used += 1
        return self._used - 1

    @property
    def start(self) -> int:
        return OUTSIDE

    def step(self, state: int, text: bytes) -> int | None:
        for byte in text:
            state = int(self._rows[state, byte])
            if state == DEAD:
                return None
        return state

    def accepts(self, state: int) -> bool:
        return state in self._complete

    def next_bytes(self, state: int) -> bytes:
        return bytes(np.flatnonzero(self._rows[state] != DEAD).astype(np.uint8))

    def text_row(self, state: int, tokens: list[int]) -> Row:
        found = trie_of(self.vocabulary).walk(self._rows, state)
        return pack(np.flatnonzero(found >= 0), self.vocabulary.size)

    def state_key(self, state: int) -> Hashable:
        return self.version, state


class DynamicLexer:
    """Identifiers that a program learns while it generates; `constraint()` allows no other in the text.

    An identifier is a letter or `_` and then letters, digits or `_`; `additional_id_chars` count as letters.
    Between identifiers any UTF-8 text is allowed. The text may end only right after a known identifier.
    """

    def __init__(self, vocabulary: Vocabulary, additional_id_chars: str | None = None):
        extra = additional_id_chars or ""
        if not extra.isascii():
            raise ConstraintError(f"additional_id_chars must be ASCII, not {extra!r}")
        self._machine = IdentifierMachine(vocabulary, extra)
        self._constraint = MachineConstraint(self._machine)

    def add(self, identifier: str) -> None:
        """Allow `identifier` from here on, also in constraints in use.

        `ConstraintError` when it is none, is longer than 256 letters, or finds no room in the lexer.
        """
        if not isinstance(identifier, str):
            raise ConstraintError(f"an identifier is a string, not {type(identifier).__name__}")
        if len(identifier) > MAX_LETTERS:
            raise ConstraintError(
                f"identifier {identifier[:9]!r}... has {len(identifier):,} letters; {MAX_LETTERS} are allowed"
            )
        spelled = identifier.encode()
        machine = self._machine
        if not spelled or spelled[0] not in machine.first_letters or not set(spelled) <= machine.letters:
            raise ConstraintError(f"{identifier!r} is not an identifier of this lexer")
        if machine.shared:
            machine = self._machine = machine.copy()
            self._constraint.move_to(machine)
        machine.add(spelled)

    def fork(self) -> DynamicLexer:
        """A lexer that knows the same identifiers and has seen the same text, and goes its own way."""
        twin = copy.copy(self)
        self._machine.shared = True
        twin._constraint = self._constraint.fork()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLexer:
        # Whoever holds the constraint beside the lexer holds one that belongs to the other afterwards too.
        twin = copy.copy(self)
        self._machine.shared = True
        twin._constraint = copy.deepcopy(self._constraint, memo)
        return twin

    def constraint(self) -> MachineConstraint[int]:
        """The constraint of this lexer: always the same object, which remembers the text so far."""
        return self._constraint
