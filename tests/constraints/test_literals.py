"""Options and substrings against their definitions, tried on every token."""

from __future__ import annotations

import tracemalloc
from random import Random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constraints import ConstraintError, literals, options, substring
from constraints.literals import SubstringMachine
from constraints.machine import MachineConstraint
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
    walk_options(texts, seed)


def walk_options(texts: list[str], seed: int) -> None:
    """Compare masks along a random text with what each option begins with."""
    spelled = {text.encode() for text in texts}
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


def test_many_options_are_brute_force():
    rng = Random(0)
    texts = ["".join(rng.choices("ab cé.", k=rng.randrange(1, 7))) for _ in range(2 * literals.MANY)]
    for seed in range(5):
        walk_options(texts, seed)


def test_the_first_mask_of_many_options_looks_at_no_text_by_itself(monkeypatch: pytest.MonkeyPatch):
    constraint = options(VOCABULARY, [f"a{number}" for number in range(5_000)])
    monkeypatch.setattr(literals.OptionsMachine, "edges", None)
    assert constraint.mask_row().any()


def test_options_are_bounded_in_bytes():
    texts = ["a" * 1000 + str(number) for number in range(200)]
    with pytest.raises(ConstraintError, match="200,490 bytes in all; 200,000 are allowed"):
        options(VOCABULARY, texts)
    machine = options(VOCABULARY, [text[:900] for text in texts] + ["b" * 19_000]).machine
    assert machine.num_states() == (1 + 900 + 19_000) // literals.NODES_IN_A_STATE


def test_without_options_nothing_is_allowed():
    assert not options(VOCABULARY, []).mask_row().any()


@pytest.mark.parametrize("wrong", ["ab", [1], [None], 7, None])
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
    st.sampled_from([0, literals.FEW]),
    st.integers(0, 1 << 16),
)
def test_substrings_are_brute_force(template: str, end: str, few: int, seed: int):
    # The end marks here begin with no byte of the template, so there is nothing for them to win against.
    texts = {run + end.encode() for run in runs(template.encode())}
    with mock.patch.object(literals, "FEW", few):
        walk(
            MachineConstraint(SubstringMachine(VOCABULARY, template.encode(), end.encode())),
            VOCABULARY,
            lambda text: any(whole.startswith(text) for whole in texts),
            lambda text: text in texts,
            Random(seed),
        )


def test_what_a_substring_remembers_does_not_grow_with_its_template():
    machine = SubstringMachine(VOCABULARY, b"a " * 5_000, b'"')
    tracemalloc.start()
    try:
        assert machine.step(machine.start, b"a " * 50) is not None
        remembered, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The places where the text may stand are some 5,000 after each of the 100 bytes.
    assert machine.num_states() <= 250 and remembered < 1_000 * machine.num_states()


def test_texts_that_stand_at_the_same_places_are_one_state():
    machine = SubstringMachine(VOCABULARY, b"b a c a b a c", b'"')
    assert machine.step(machine.start, b"a c") == machine.step(machine.start, b"c")
    assert machine.step(machine.start, b"c a") != machine.step(machine.start, b"a")
    assert machine.step(machine.start, b"c a b") == machine.step(machine.start, b"a b")


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
