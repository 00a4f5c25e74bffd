"""Rows of tokens by the bytes that they have: many tokens are told apart with few operations."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from constraints.token_set import Row, freeze, pack
from constraints.vocabulary import Vocabulary, once_per_vocabulary

Span = tuple[int, int]
"""The first and the last of some bytes in a row."""

ASCII = 128
MAX_KEPT = 24
"""Lengths for which the row of longer tokens is kept; tokens beyond are few and soon counted."""


class ByteRows:
    """Of one vocabulary; `byte_rows_of` makes it once. It holds some 540 rows."""

    def __init__(self, vocabulary: Vocabulary):
        texts = vocabulary.texts
        self.size = vocabulary.size
        lengths = np.array([len(text) for text in texts])
        ids = np.flatnonzero(lengths)
        begins = np.cumsum(lengths) - lengths
        text = np.frombuffer(b"".join(texts), np.uint8)
        owner = np.repeat(np.arange(len(texts)), lengths)
        self._below = self._rows_below(ids, text[begins[ids]])
        inside = np.ones(len(text), bool)
        inside[begins[ids]] = False
        self._later = self._tree(owner[inside], text[inside])
        self.later_high = self._row(owner[inside & (text >= ASCII)])
        """Tokens with a byte that is not ASCII after their first."""
        self.utf8 = self._row([i for i in ids.tolist() if _is_utf8(texts[i])])
        """Tokens that are UTF-8 text, perhaps but for the end of their last character."""
        self.utf8_later = self._row([i for i in ids.tolist() if _is_utf8(texts[i][1:])])
        """Tokens that are so after their first byte."""
        self._lengths = lengths
        self._longer = [self._row(np.flatnonzero(lengths > length)) for length in range(MAX_KEPT)]

    def num_bytes(self) -> int:
        """The memory of all rows."""
        single = (self.later_high, self.utf8, self.utf8_later, *self._longer)
        return self._below.nbytes + self._later.nbytes + sum(row.nbytes for row in single)

    def _row(self, ids: NDArray[np.integer] | list[int]) -> Row:
        return freeze(pack(np.asarray(ids, np.int64), self.size))

    def _rows_below(self, ids: NDArray[np.integer], firsts: NDArray[np.uint8]) -> Row:
        """Row b: the tokens whose first byte is less than b."""
        rows = np.zeros((257, (self.size + 31) // 32), np.int32)
        for byte in range(256):
            rows[byte + 1] = rows[byte] | pack(ids[firsts == byte], self.size)
        return rows

    def _tree(self, owners: NDArray[np.integer], bytes_: NDArray[np.uint8]) -> Row:
        """Row ASCII + b: the tokens that have byte b. Row i below: those of the rows 2 i and 2 i + 1."""
        rows = np.zeros((2 * ASCII, (self.size + 31) // 32), np.int32)
        for byte in range(ASCII):
            rows[ASCII + byte] = pack(owners[bytes_ == byte], self.size)
        for node in range(ASCII - 1, 0, -1):
            rows[node] = rows[2 * node] | rows[2 * node + 1]
        return rows

    def first_in(self, spans: Iterable[Span]) -> Row:
        """The tokens whose first byte is in one of `spans`, which do not overlap. Writable."""
        row: Row = np.zeros_like(self._below[0])
        for low, high in spans:
            row ^= self._below[high + 1]
            row ^= self._below[low]
        return row

    def later_in(self, spans: Iterable[Span]) -> Row:
        """The tokens that have an ASCII byte of `spans` after their first byte. Writable."""
        row: Row = np.zeros_like(self._below[0])
        for low, high in spans:
            left, right = low + ASCII, high + ASCII + 1
            while left < right:
                if left & 1:
                    row |= self._later[left]
                    left += 1
                if right & 1:
                    right -= 1
                    row |= self._later[right]
                left >>= 1
                right >>= 1
        return row

    def longer_than(self, length: int) -> Row:
        """The tokens with more than `length` bytes."""
        if length < MAX_KEPT:
            return self._longer[length]
        return self._row(np.flatnonzero(self._lengths > length))


def _is_utf8(text: bytes) -> bool:
    if len(text) > 1 and text[-2] == 0xED and text[-1] >= 0xA0:
        # Python takes half a surrogate for a character that is cut off.
        return False
    try:
        utf_8_decode(text, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


byte_rows_of = once_per_vocabulary(ByteRows)
"""The rows of a vocabulary, made once."""
