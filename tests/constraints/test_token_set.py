"""TokenSet against Python's own sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from constraints import TokenSet
from tests.constraints.walks import small_vocabulary

SIZES = st.sampled_from([1, 31, 32, 33, 64, 100])


@given(SIZES, st.data())
def test_operations_are_those_of_sets(size: int, data: st.DataObject):
    ids = st.sets(st.integers(0, size - 1))
    a, b = data.draw(ids), data.draw(ids)
    left, right = TokenSet.of(a, size), TokenSet.of(b, size)
    for got, wanted in [
        (left | right, a | b),
        (left & right, a & b),
        (left ^ right, a ^ b),
        (left - right, a - b),
        (~left, set(range(size)) - a),
        (left.copy(), a),
    ]:
        assert set(got.ids().tolist()) == wanted
        assert got.num_set() == len(wanted)
        assert got == TokenSet.of(wanted, size)
    assert len(left) == size and [left[i] for i in range(size)] == [i in a for i in range(size)]
    left |= right
    assert set(left.ids().tolist()) == a | b


@given(SIZES, st.data())
def test_assignment_sets_one_bit(size: int, data: st.DataObject):
    token, value = data.draw(st.integers(0, size - 1)), data.draw(st.booleans())
    for start in (set(), set(range(size))):
        tokens = TokenSet.of(start, size)
        tokens[token] = value
        assert set(tokens.ids().tolist()) == (start | {token} if value else start - {token})


def test_set_all_leaves_the_spare_bits_of_the_last_word_alone():
    tokens = TokenSet(33)
    tokens.set_all(True)
    assert tokens.num_set() == 33 and tokens.row.tolist() == [-1, 1]
    tokens.set_all(False)
    assert not tokens.row.any()


def test_the_row_is_the_memory():
    tokens = TokenSet(40)
    tokens.row[1] = 1
    assert tokens[32]
    assert np.asarray(tokens) is tokens.row
    assert TokenSet(40, row=tokens.row).row is tokens.row


def test_misuse_is_an_error():
    tokens = TokenSet(10)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            tokens[index]
        with pytest.raises(IndexError):
            tokens[index] = True
        with pytest.raises(IndexError):
            TokenSet.of([index], 10)
    with pytest.raises(TypeError):
        tokens[0] = 1  # type: ignore[assignment]
    with pytest.raises(TypeError):
        tokens.set_all(1)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        del tokens[0]
    with pytest.raises(ValueError):
        tokens | TokenSet(11)
    with pytest.raises(ValueError):
        TokenSet(10, row=np.zeros(2, np.int32))
    with pytest.raises(TypeError):
        hash(tokens)


def test_repr_names_tokens_or_what_is_missing():
    v = small_vocabulary("a", '"', b"\xff", *(f"t{i}" for i in range(60)))
    assert repr(v.token_set([0, 2, 3, 4, 5])) == f'TokenSet: 5/{v.size}; EOS, EMPTY[2], "a", "\\"", HEX[ff]'
    assert repr(~v.token_set([3])) == f'TokenSet: {v.size - 1}/{v.size}; ALL EXCEPT "a"'
    shown = repr(v.token_set(range(60)))
    assert shown.endswith(", ...") and shown.count(",") == 50
    assert repr(TokenSet.of([1], 3)) == "TokenSet: 1/3; 1"
