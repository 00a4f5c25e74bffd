"""DynamicLexer against its definition, tried on every token."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, DynamicLexer, identifiers
from tests.constraints.regex_oracle import split_tail
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary(
    "foo",
    "fo",
    "o",
    "foo.",
    ".foo",
    "bar(",
    "foo(bar)",
    "foobar",
    "x1",
    " foo ",
    "é",
    "fooé",
    b"\xc3",
    b"\xa9",
    "12",
    "1foo",
    "foo1",
    b"\xff",
    b"\xe0\x80",
    "日",
    single="fobarx1 .(-$_\n",
)
NAMES = ["foo", "f", "food", "bar", "x1", "_", "oo", "b_1"]


def oracle(names: list[str], extra: str):
    letters = "a-zA-Z_" + re.escape(extra)
    identifier = re.compile(f"[{letters}][{letters}0-9]*")

    def split(text: bytes) -> tuple[list[str], str] | None:
        """The identifiers that are finished and the one that reaches the end; None for no UTF-8."""
        head, tail = split_tail(text)
        if head is None:
            return None
        found = list(identifier.finditer(head))
        at_end = not tail and found and found[-1].end() == len(head)
        return [m[0] for m in (found[:-1] if at_end else found)], found[-1][0] if at_end else ""

    def viable(text: bytes) -> bool:
        parts = split(text)
        return (
            parts is not None
            and all(name in names for name in parts[0])
            and (not parts[1] or any(name.startswith(parts[1]) for name in names))
        )

    def ends(text: bytes) -> bool:
        parts = split(text)
        return parts is not None and parts[1] in names

    return viable, ends


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), unique=True), st.sampled_from(["", "$", "-$"]), st.integers(0, 1 << 16)
)
def test_masks_are_brute_force(names: list[str], extra: str, seed: int):
    lexer = DynamicLexer(VOCABULARY, extra or None)
    for name in names:
        lexer.add(name)
    walk(lexer.constraint(), VOCABULARY, *oracle(names, extra), Random(seed), steps=8)


def test_an_identifier_added_in_mid_text_is_known_at_once():
    lexer = DynamicLexer(VOCABULARY)
    lexer.add("foo")
    constraint = lexer.constraint()
    constraint.append_token(VOCABULARY.greedy(b"foo")[0])
    one, key = VOCABULARY.greedy(b"1")[0], constraint.state_key()
    assert not constraint.token_allowed(one)
    before = constraint.mask_row()
    lexer.add("foo1")
    assert constraint.token_allowed(one) and constraint.state_key() != key
    assert (constraint.mask_row() != before).any()
    assert lexer.constraint() is constraint


@pytest.mark.parametrize("name", ["", "1a", "a b", "é", "a-b"])
def test_what_is_no_identifier_is_refused(name: str):
    with pytest.raises(ConstraintError, match="not an identifier"):
        DynamicLexer(VOCABULARY).add(name)


@pytest.mark.parametrize("name", [7, None, b"foo"])
def test_an_identifier_is_a_string(name: object):
    with pytest.raises(ConstraintError, match="an identifier is a string, not"):
        DynamicLexer(VOCABULARY).add(name)  # type: ignore[arg-type]


def test_identifiers_are_bounded(monkeypatch: pytest.MonkeyPatch):
    lexer = DynamicLexer(VOCABULARY)
    with pytest.raises(ConstraintError, match="has 60,000 letters; 256 are allowed"):
        lexer.add("a" * 60_000)
    monkeypatch.setattr(identifiers, "MAX_ALL_LETTERS", 10)
    lexer.add("foobar")
    for name in ("foobarxx111", "xx111"):
        with pytest.raises(ConstraintError, match=f"'{name}' is one too many: .* 10 letters at most"):
            lexer.add(name)
    lexer.add("foobarxx")
    lexer.add("foo")
    lexer.add("fx1")
    # What was refused left nothing behind that the text could begin with.
    oracles = oracle(["foobar", "foobarxx", "foo", "fx1"], "")
    walk(lexer.constraint(), VOCABULARY, *oracles, Random(1), steps=8)


def test_additional_characters_must_be_ascii():
    with pytest.raises(ConstraintError, match="ASCII"):
        DynamicLexer(VOCABULARY, "é")


def test_a_fork_learns_for_itself():
    lexer = DynamicLexer(VOCABULARY)
    lexer.add("fo")
    here = lexer.constraint()
    for token in VOCABULARY.greedy(b"fo"):
        here.append_token(token)
    fork = lexer.fork()
    there = fork.constraint()
    assert there is not here and (there.mask_row() == here.mask_row()).all()
    before, token = here.mask_row().copy(), VOCABULARY.greedy(b"o")[0]
    fork.add("foo")
    assert there.token_allowed(token) and not here.token_allowed(token)
    assert (here.mask_row() == before).all() and not (there.mask_row() == before).all()
    lexer.add("fox")
    assert here.token_allowed(VOCABULARY.greedy(b"x")[0]) and not there.token_allowed(
        VOCABULARY.greedy(b"x")[0]
    )
    assert fork.fork().constraint().token_allowed(token)
