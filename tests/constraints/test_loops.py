"""Masks from rows of tokens: the same as from a walk of the token tree, wherever there are any."""

from __future__ import annotations

import string
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import TokenSet, Vocabulary, loops
from constraints.byte_rows import byte_rows_of
from constraints.regex_constraint import RegexMachine
from tests.constraints.test_regex_constraint import PATTERNS, VOCABULARY
from tests.constraints.walks import small_vocabulary

LOOPS = [
    "[a-z ]+",
    "[a-z]+!",
    "[a-z]{1,4}[a-c]!",
    "[a-z]*[a-z0-9]{2}",
    "[a-z]{2,5}",
    r'"[^"\n]*"',
    r"[^\n]{1,100}",
    r"[^\n]{0,3}\n",
    r"[^a]+a[^b]*",
    r"[A-Z][a-z]+( [A-Z][a-z]+){1,5}",
    r"[A-Za-z0-9_.+-]+@[A-Za-z0-9_-]+\.[a-z]{2,4}",
    "([a-z]+){2}[0-9]",
    "(a+)+b",
    "[a-z]+|[0-9]+|x!",
    r"-?[0-9]+(\.[0-9]+)?",
    r"(?s).*",
    "(yes|no|maybe|certainly not)",
    "|".join(f"<{n}[a-z]*>" for n in range(100)),
]

SELDOM = [
    "[a-z]{3,}é",
    "([a-z]+|[0-9]+) [é-ü]*",
    "[ -~]+[^ -~]",
    "[é-ü]{2,6}x",
    r"\w+ (\w+ )*日",
    "é[^é]*",
    "([a-z]{2,})+-",
    r"\s*a\s*",
    "日[^x]+x",
]
"""Patterns of which a real vocabulary may have too many tokens to try."""


def compare(vocabulary: Vocabulary, pattern: str, seed: int, steps: int) -> int:
    """Along a random walk, the row is the one of the walk of the tree. Returns how often there was one."""
    machine, random = RegexMachine(vocabulary, pattern), Random(seed)
    state, made = machine.start, 0
    for _ in range(steps):
        walked = machine.walked_row(state)
        row = loops.row_of(vocabulary, machine.automaton, state)
        if row is not None:
            wrong = TokenSet(vocabulary.size, row=row ^ walked).ids()
            assert not len(wrong), (pattern, state, vocabulary.tokens_repr(wrong[:20]))
            made += 1
        onward = TokenSet(vocabulary.size, row=walked).ids().tolist()
        if not onward:
            break
        after = machine.step(state, vocabulary.token_bytes(random.choice(onward)))
        assert after is not None
        state = after
    return made


@pytest.mark.parametrize("pattern", LOOPS + SELDOM)
@pytest.mark.parametrize("name", ["smol", "tekken"])
def test_on_real_vocabularies(name: str, pattern: str, request: pytest.FixtureRequest):
    vocabulary = request.getfixturevalue(name)
    made = sum(compare(vocabulary, pattern, seed, 6) for seed in range(2))
    assert made or pattern in SELDOM


@pytest.mark.parametrize("pattern", PATTERNS + LOOPS + SELDOM)
def test_on_a_small_vocabulary(pattern: str):
    assert sum(compare(VOCABULARY, pattern, seed, 12) for seed in range(4))


BROKEN = small_vocabulary(
    b"\xc3", b"\xa9", b"\xa9a", b"\xc3\xa9", b"a\xc3", b"\xe6\x97", b"\xe6\x97\xa5", b"\xa5\xe6", b"\xff",
    b"\xc0\x80", b"\xed\xa0\x80", b"\xed\xa0", b"\xf0\x9f", b"\x98\x80a", b"a\xa9", b"\xc3\xa9\xa9", b"\xf5",
    b"\xe0\x80", b"\xf0\x80", b"\xf4\x90", b"\xe0\xa0", b"\xed\x9f", b"\n\n", b"aa", b"aaaa", b"a b",
    b"\x00a", single=bytes(range(256)),
)  # fmt: skip


@pytest.mark.parametrize("pattern", ["[^a]+", "[^a]{1,2}", "é[^é]*a", "日[^x]+", "[a-b]+é", r"\x00?[^b]*b"])
def test_no_invalid_utf8(pattern: str):
    assert sum(compare(BROKEN, pattern, seed, 12) for seed in range(8))


CLASSES = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", "[a-c1]", r"\d", r"\s", "é", "[é-日]", "[^é]"])
COUNTS = st.sampled_from(["", "*", "+", "?", "{2}", "{1,3}", "{2,}", "{0,9}"])
PARTS = st.tuples(CLASSES, COUNTS).map("".join)
GROUPS = st.tuples(st.lists(PARTS, min_size=1, max_size=3).map("".join), COUNTS).map(
    lambda p: f"({p[0]}){p[1]}"
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS | GROUPS | st.just("|"), min_size=1, max_size=5).map("".join), st.integers(0, 99))
def test_on_generated_patterns(pattern: str, seed: int):
    compare(VOCABULARY, pattern, seed, 6)


@given(st.integers(0, (1 << 128) - 1))
def test_bits_as_ranges(bits: int):
    assert loops._bits(loops._spans(bits)) == bits


def test_rows_of_bytes():
    rows, size = byte_rows_of(BROKEN), BROKEN.size
    texts = {i: BROKEN.token_bytes(i) for i in range(size) if BROKEN.token_bytes(i)}

    def ids(row: np.ndarray) -> set[int]:
        return set(TokenSet(size, row=row).ids().tolist())

    letters = set(string.ascii_lowercase.encode())
    assert ids(rows.first_in([(97, 122)])) == {i for i, text in texts.items() if text[0] in letters}
    assert ids(rows.first_in([(0, 96), (123, 255)])) == {i for i, t in texts.items() if t[0] not in letters}
    for low in (0, 1, 31, 97):
        for high in (97, 98, 127):
            later = {i for i, text in texts.items() if any(low <= byte <= high for byte in text[1:])}
            assert ids(rows.later_in([(low, high)])) == later
    for length in (0, 1, 2, 50):
        assert rows.num_bytes() < 600 * 4 * BROKEN.num_words
        assert ids(rows.longer_than(length)) == {i for i, text in texts.items() if len(text) > length}
