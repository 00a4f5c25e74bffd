"""The token tree against a loop over the tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import Vocabulary
from constraints.trie import StepTable, TokenTrie

TEXTS = st.lists(st.binary(min_size=0, max_size=6), max_size=30)
ROWS = st.lists(st.lists(st.integers(-1, 3), min_size=4, max_size=4), min_size=4, max_size=4)


@settings(max_examples=200)
@given(TEXTS, ROWS, st.integers(0, 3))
def test_a_walk_is_a_loop_over_the_tokens(texts: list[bytes], rows: list[list[int]], start: int):
    vocabulary = Vocabulary(texts)
    table = np.array([[row[byte % 4] for byte in range(256)] for row in rows], np.int32)
    wanted = []
    for text in texts:
        state = start if text else -1
        for byte in text:
            state = int(table[state, byte]) if state >= 0 else -1
        wanted.append(state)
    trie = TokenTrie(vocabulary)
    assert trie.walk(table, start).tolist() == wanted
    assert trie.walk_by(StepTable(lambda state: table[state].tolist()), start).tolist() == wanted


def test_a_step_table_grows_with_the_states():
    table = StepTable(lambda state: [state + 1] * 256)
    states = np.arange(0, 300, dtype=np.int32)
    assert table(states, np.zeros(300, np.uint8)).tolist() == list(range(1, 301))
