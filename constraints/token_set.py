"""`TokenSet`: a set of token ids, packed 32 to an int32 word, as masks are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from constraints.vocabulary import Vocabulary

Row = NDArray[np.int32]
"""A mask: int32[ceil(size / 32)], bit `t % 32` of word `t // 32` set when token t is in."""

SHOWN = 50
"""Tokens named by `repr` before it writes an ellipsis."""


class TokenSet:
    """A set of token ids below `size`. `row` is its memory, writable unless it was made read-only."""

    __slots__ = ("_size", "row", "vocabulary")

    def __init__(self, size: int, vocabulary: Vocabulary | None = None, row: Row | None = None):
        words = (size + 31) // 32
        if row is None:
            row = np.zeros(words, np.int32)
        elif row.dtype != np.int32 or row.shape != (words,):
            raise ValueError(f"row must be int32[{words}], not {row.dtype}{list(row.shape)}")
        self._size = size
        self.row: Row = row
        self.vocabulary = vocabulary

    @classmethod
    def of(cls, ids: Iterable[int], size: int, vocabulary: Vocabulary | None = None) -> TokenSet:
        """The set of `ids`. IndexError for an id outside 0..size-1."""
        return cls(size, vocabulary, pack(np.fromiter(ids, np.int64), size))

    def __len__(self) -> int:
        """How many tokens the vocabulary has, not how many are set."""
        return self._size

    def __getitem__(self, token: int) -> bool:
        word, bit = self._place(token)
        return bool((int(self.row[word]) >> bit) & 1)

    def __setitem__(self, token: int, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"a token is in the set or not: assign True or False, not {value!r}")
        word, bit = self._place(token)
        bits = self.row.view(np.uint32)
        flag = np.uint32(1 << bit)
        bits[word] = bits[word] | flag if value else bits[word] & ~flag

    def __delitem__(self, token: int) -> None:
        raise IndexError("tokens cannot be deleted from a TokenSet; assign False")

    def set_all(self, value: bool) -> None:
        """Put every token in, or take every token out."""
        if not isinstance(value, bool):
            raise TypeError(f"set_all takes True or False, not {value!r}")
        self.row[:] = -1 if value else 0
        self._clear_tail()

    def num_set(self) -> int:
        """How many tokens are in."""
        return int(np.bitwise_count(self.row.view(np.uint32)).sum())

    def ids(self) -> NDArray[np.int64]:
        """The ids that are in, ascending."""
        return unpack(self.row)

    def copy(self) -> TokenSet:
        return TokenSet(self._size, self.vocabulary, self.row.copy())

    def __array__(self, dtype: object = None, copy: bool | None = None) -> Row:
        return self.row.copy() if copy else self.row

    def __or__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self._size, self.vocabulary, self.row | self._peer(other))

    def __and__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self._size, self.vocabulary, self.row & self._peer(other))

    def __xor__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self._size, self.vocabulary, self.row ^ self._peer(other))

    def __sub__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self._size, self.vocabulary, self.row & ~self._peer(other))

    def __invert__(self) -> TokenSet:
        inverse = TokenSet(self._size, self.vocabulary, ~self.row)
        inverse._clear_tail()
        return inverse

    def __ior__(self, other: TokenSet) -> TokenSet:
        self.row |= self._peer(other)
        return self

    def __iand__(self, other: TokenSet) -> TokenSet:
        self.row &= self._peer(other)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSet):
            return NotImplemented
        return self._size == other._size and np.array_equal(self.row, other.row)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        count = self.num_set()
        inverted = (self._size - count) * 20 < count
        ids = (~self if inverted else self).ids()
        names = [self._name(int(token)) for token in ids[:SHOWN]]
        if len(ids) > SHOWN:
            names.append("...")
        listed = ("ALL EXCEPT " if inverted else "") + ", ".join(names)
        return f"TokenSet: {count}/{self._size}; {listed}"

    def _name(self, token: int) -> str:
        return self.vocabulary.token_repr(token) if self.vocabulary else str(token)

    def _place(self, token: int) -> tuple[int, int]:
        if not 0 <= token < self._size:
            raise IndexError(f"token {token} is not in 0..{self._size - 1}")
        return token >> 5, token & 31

    def _peer(self, other: TokenSet) -> Row:
        if not isinstance(other, TokenSet):
            raise TypeError(f"expected a TokenSet, not {type(other).__name__}")
        if other._size != self._size:
            raise ValueError(f"sets over {self._size} and {other._size} tokens cannot be combined")
        return other.row

    def _clear_tail(self) -> None:
        if spare := self._size & 31:
            self.row.view(np.uint32)[-1] &= np.uint32((1 << spare) - 1)


def pack(ids: NDArray[np.integer], size: int) -> Row:
    """The row with the bits of `ids` set. IndexError for an id outside 0..size-1."""
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise IndexError(f"token ids must be in 0..{size - 1}")
    flags = np.zeros((size + 31) // 32 * 32, bool)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def unpack(row: Row) -> NDArray[np.int64]:
    """The ids whose bits are set in `row`, ascending."""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def freeze(row: Row) -> Row:
    """Mark `row` read-only: it is about to be shared."""
    row.flags.writeable = False
    return row
