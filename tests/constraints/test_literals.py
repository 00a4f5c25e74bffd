"""Options and substrings against their definitions, tried on every token."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, options, substring
from tests.constraints.walks import small_vocabulary, walk

VOCABULARY = small_vocabulary(
    "ab",
    "a b",
    "b ",
    " a",
    "aa",
    "é",
    "éa",
    b"\xc3",
    b"\xa9",
    '"',
    'a"',
    '"b',
    " b a",
    "ba",
    "  ",
    single='ab c."',
)
TEXTS = st.text(st.sampled_from("ab cé."), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=5), st.integers(0, 1 << 16))
def test_options_are_brute_force(texts: list[str], seed: int):
    spelled = [text.encode() for text in texts]
    walk(
        options(VOCABULARY, texts),
        VOCABULARY,
        lambda text: any(option.startswith(text) for option in spelled),
        lambda text: text in spelled,
        Random(seed),
    )


def test_a_longer_option_stays_reachable_past_a_shorter_one():
    constraint = options(VOCABULARY, ["a", "ab"])
    constraint.append_token(VOCABULARY.greedy(b"a")[0])
    assert constraint.eos_allowed() and not constraint.eos_forced()
    constraint.append_token(VOCABULARY.greedy(b"b")[0])
    assert constraint.eos_forced()


def test_without_options_nothing_is_allowed():
    assert not options(VOCABULARY, []).mask_row().any()


@pytest.mark.parametrize("wrong", ["ab", [1], [None]])
def test_options_that_are_no_texts_are_refused(wrong: object):
    with pytest.raises(ConstraintError, match="list of strings"):
        options(VOCABULARY, wrong)  # type: ignore[arg-type]


def runs(template: bytes) -> set[bytes]:
    """Every run of words of `template`."""
    starts = [i for i in range(len(template) + 1) if i == 0 or template[i - 1 : i] == b" "]
    ends = [i for i in range(len(template) + 1) if i == len(template) or template[i : i + 1] == b" "]
    return {template[a:b] for a in starts for b in ends if a <= b}


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("ab é"), max_size=12),
    st.sampled_from(["", '"', '"b', ". ", "c"]),
    st.integers(0, 1 << 16),
)
def test_substrings_are_brute_force(template: str, end: str, seed: int):
    # The end marks here begin with no byte of the template, so there is nothing for them to win against.
    texts = {run + end.encode() for run in runs(template.encode())}
    walk(
        substring(VOCABULARY, template, end),
        VOCABULARY,
        lambda text: any(whole.startswith(text) for whole in texts),
        lambda text: text in texts,
        Random(seed),
    )


def test_where_a_word_may_end_the_end_mark_wins():
    constraint = substring(VOCABULARY, "a b a", " b")
    for token in VOCABULARY.greedy(b"a"):
        constraint.append_token(token)
    for byte in b" b":
        constraint.append_token(VOCABULARY.greedy(bytes([byte]))[0])
    assert constraint.eos_forced()


def test_an_empty_end_mark_lets_the_text_end_after_any_word():
    constraint = substring(VOCABULARY, "ab ba", "")
    constraint.append_token(VOCABULARY.greedy(b"ab")[0])
    assert constraint.eos_allowed() and not constraint.eos_forced()
    with pytest.raises(ConstraintError):
        substring(VOCABULARY, None)  # type: ignore[arg-type]
