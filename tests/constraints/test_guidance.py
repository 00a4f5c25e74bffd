"""Lark constraints against an Earley parser, tried on every token."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, TokenSet, lark
from tests.constraints.grammar_oracle import GrammarOracle, Rules
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary("ab", "aa", "(a", "a)", "()", "))", "+a", "b+", "aab", single="ab()+1")
SYMBOLS = st.sampled_from(["'a'", "'b'", "'('", "')'", "'+'", "x", "y"])
BODIES = st.lists(st.lists(SYMBOLS, min_size=1, max_size=3), min_size=1, max_size=3, unique_by=tuple)


def as_lark(rules: Rules) -> str:
    lines = [f"{name}: {' | '.join(' '.join(body) for body in bodies)}" for name, bodies in rules.items()]
    return "\n".join(lines).replace("'", '"')


def productive(rules: Rules) -> bool:
    known: set[str] = set()
    for _ in rules:
        known |= {
            n for n, bodies in rules.items() if any(all(s[0] == "'" or s in known for s in b) for b in bodies)
        }
    return known == set(rules)


@settings(max_examples=70, deadline=None)
@given(BODIES, BODIES, BODIES, st.integers(0, 1 << 16))
def test_masks_of_generated_grammars_are_brute_force(start, x, y, seed: int):
    rules: Rules = {"start": start, "x": x, "y": y}
    assume(productive(rules))
    oracle = GrammarOracle(rules)
    walk(lark(VOCABULARY, as_lark(rules)), VOCABULARY, oracle.viable, oracle.ends, Random(seed), steps=6)


def test_regex_terminals_and_repeats():
    constraint = lark(VOCABULARY, 'start: "(" NAME ("+" NAME)* ")"\nNAME: /[ab]+/')
    for token in VOCABULARY.greedy(b"(ab+aab)"):
        assert constraint.token_allowed(token)
        constraint.append_token(token)
    assert constraint.eos_forced()
    assert TokenSet(VOCABULARY.size, row=constraint.mask_row()).ids().tolist() == [0, 1]
    constraint.rollback(2)
    assert not constraint.eos_allowed() and constraint.mask_row().any()


def test_equal_histories_share_one_mask():
    one, two = (lark(VOCABULARY, 'start: "a" start "b" | "("') for _ in range(2))
    for constraint in (one, two):
        constraint.append_token(VOCABULARY.greedy(b"a")[0])
    assert one.state_key() == two.state_key()
    assert one.mask_row() is two.mask_row()
    two.append_token(VOCABULARY.greedy(b"a")[0])
    assert one.state_key() != two.state_key()
    assert lark(VOCABULARY, 'start: "a"').state_key() != lark(VOCABULARY, 'start: "b"').state_key()


def test_an_illegal_token_leaves_the_constraint_usable():
    constraint = lark(VOCABULARY, 'start: "a" "b"')
    for token in (2, VOCABULARY.greedy(b"b")[0], VOCABULARY.size, -1):
        with pytest.raises(ConstraintError, match="not allowed"):
            constraint.append_token(token)
    constraint.append_token(0)
    constraint.append_token(VOCABULARY.greedy(b"a")[0])
    with pytest.raises(ConstraintError, match="take back 3"):
        constraint.rollback(3)
    constraint.rollback(2)
    assert constraint.mask_row().any()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: x", "unknown name"),
        ("start: (", r"1\(9\)"),
        ("start: /(/", "regex"),
        ("x: 'a'", "lexer error"),
        ("", "start|rule"),
    ],
)
def test_what_does_not_compile_is_explained(grammar: str, message: str):
    with pytest.raises(ConstraintError, match=f"(?is)Lark grammar does not compile.*({message})"):
        lark(VOCABULARY, grammar)


@pytest.mark.parametrize("grammar", [3, None, b'start: "a"'])
def test_a_grammar_is_a_string(grammar: object):
    with pytest.raises(ConstraintError, match="a Lark grammar is a string, not"):
        lark(VOCABULARY, grammar)  # type: ignore[arg-type]


def test_an_explosive_grammar_is_followed_or_refused_as_too_complex():
    doubled = "\n".join(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}" for i in range(60)) + '\na60: "a" | "b"'
    constraint = lark(VOCABULARY, "start: a0\n" + doubled)
    try:
        for _ in range(20):
            assert constraint.mask_row().any()
            constraint.append_token(VOCABULARY.greedy(b"a")[0])
    except ConstraintError as error:
        assert "complex" in str(error)


def test_special_tokens_cannot_be_named_into_a_mask():
    with pytest.raises(ConstraintError, match="unknown special token"):
        lark(VOCABULARY, 'start: "a" <|tool|>')
    constraint = lark(VOCABULARY, 'start: "a" <[2]>')
    constraint.append_token(VOCABULARY.greedy(b"a")[0])
    assert not constraint.mask_row().any()
