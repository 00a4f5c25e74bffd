"""Generations and masked tokens, driven token by token against a list of texts that are still possible."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import constraints
from aici_vllm.controller.awaits import Generate
from aici_vllm.controller.decisions import Splice
from aici_vllm.controller.sampling import Generation, MaskedToken, Sampling
from constraints import AnyText, Constraint, ConstraintError, TokenSet, Vocabulary
from tests.controller.scripts import EOS, VOCABULARY

TINY = Vocabulary([b"a", b"b", b"c", b"ab", b"bc", b"abc", None, None], eos_token_ids=[6, 7])
"""Two ends; tokens that are the prefix of others."""


def generation(
    constraint: Constraint, max_tokens: int = 20, vocabulary: Vocabulary = VOCABULARY, **request: Any
) -> Generation:
    return Generation(Generate(constraint, max_tokens=max_tokens, **request), vocabulary)


def allowed(sampling: Sampling) -> list[int]:
    row = sampling.mask_row()
    assert row.dtype == np.int32
    return [int(token) for token in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]


def accept(sampling: Sampling, text: str) -> None:
    for token in text.encode():
        sampling.accept(token)


# Drafts.

PATTERNS = st.sampled_from(["[a-c]*", "a(bc)+|a[ab]{2}", "(ab|abc){1,3}c?", "[a-c]{3}"])


DRAFTS = st.lists(st.sampled_from([*b"abc", EOS, -1]), max_size=6)


@given(PATTERNS, DRAFTS, st.integers(0, 3), st.integers(1, 5))
def test_ahead_is_what_accepting_the_drafts_comes_to(
    pattern: str, drafts: list[int], min_tokens: int, max_tokens: int
) -> None:
    def started() -> Generation:
        made = generation(constraints.regex(VOCABULARY, pattern), max_tokens, min_tokens=min_tokens)
        made.take_forced()
        return made

    asked, running = started(), started()
    reached = asked.ahead(drafts)
    assert asked.tokens == running.tokens and allowed(asked) == allowed(running)
    for draft, sampling in zip(drafts, reached, strict=False):
        running.accept(draft)
        assert not running.finished and running.take_forced() == []
        assert allowed(sampling) == allowed(running) and sampling.mask_key() == running.mask_key()
    if len(reached) < len(drafts) and (draft := drafts[len(reached)]) in allowed(running):
        running.accept(draft)
        assert running.finished or running.take_forced()


def test_a_draft_at_which_a_constraint_breaks_is_as_far_as_it_goes() -> None:
    class Breaks(AnyText):
        def append_token(self, token: int) -> None:
            if token == 2:
                raise RuntimeError("no c")

        def fork(self) -> Breaks:
            return Breaks(self.vocabulary)

    assert len(generation(Breaks(TINY), vocabulary=TINY).ahead([0, 1, 2, 0])) == 2
    assert MaskedToken(TokenSet.of([1], 8), []).ahead([1]) == []


# Ends.


def test_ends_at_any_end_of_sequence_which_it_returns() -> None:
    for end in TINY.eos_token_ids:
        running = generation(AnyText(TINY), vocabulary=TINY)
        running.accept(0)
        assert not running.finished
        running.accept(end)
        assert running.finished and running.tokens == [0, end] and not running.dead_end


def test_ends_at_the_budget() -> None:
    running = generation(AnyText(VOCABULARY), max_tokens=2)
    accept(running, "a")
    assert not running.finished
    accept(running, "b")
    assert running.finished and running.tokens == list(b"ab")


def test_a_budget_of_none_is_over_before_it_begins() -> None:
    running = generation(constraints.regex(VOCABULARY, "abc"), max_tokens=0)
    assert running.finished and running.take_forced() == [] and running.tokens == []


def test_ends_where_the_constraint_forces_it_without_an_end_of_sequence() -> None:
    running = generation(constraints.regex(VOCABULARY, "[ab]c?"))
    accept(running, "a")
    assert not running.finished and allowed(running) == [ord("c"), EOS]
    accept(running, "c")
    assert running.finished and running.tokens == list(b"ac")
    assert generation(constraints.regex(VOCABULARY, "")).finished


PIECES = st.lists(st.sampled_from(["a", "b", "he", "hello", " wor", "\n"]), max_size=8)


@given(PIECES, st.sampled_from(["a", "ab", "lo w", "hehe", "o wora", "\nb", "é"]))
def test_stops_after_the_token_in_which_the_text_holds_stop_at(pieces: list[str], stop: str) -> None:
    ids = [token for piece in pieces for token in VOCABULARY.tokenize(piece)]
    running = generation(AnyText(VOCABULARY), max_tokens=100, stop_at=stop.encode())
    for count, token in enumerate(ids, start=1):
        running.accept(token)
        text = VOCABULARY.detokenize(ids[:count])
        assert running.finished == (stop.encode() in text)
        if running.finished:
            break
    assert running.tokens == ids[: len(running.tokens)]


@pytest.mark.parametrize("stop", ["b", "ab", "aab", "aaab"])
def test_stop_at_may_stand_across_any_number_of_tokens(stop: str) -> None:
    running = generation(AnyText(VOCABULARY), stop_at=stop.encode())
    accept(running, "aaa")
    assert not running.finished
    accept(running, "b")
    assert running.finished


def test_stop_at_is_found_in_forced_text_too() -> None:
    running = generation(constraints.regex(VOCABULARY, "abcdef"), stop_at=b"cd")
    assert running.take_forced() == list(b"abcd") and running.finished


def test_long_forced_text_is_walked_once() -> None:
    text = b"word and more " * 200
    running = generation(constraints.options(VOCABULARY, [text]), max_tokens=5_000)
    machine, steps = running.request.constraint.machine, 0  # type: ignore[attr-defined]

    def step(state: int, piece: bytes) -> int | None:
        nonlocal steps
        steps += len(piece)
        return type(machine).step(machine, state, piece)

    machine.step = step
    assert VOCABULARY.detokenize(running.take_forced()) == text and running.finished
    # Once to find the run, and once more for its tokens.
    assert steps == 2 * len(text)


# Masks.


def test_any_text_allows_everything_but_special_tokens_and_the_end() -> None:
    assert allowed(generation(AnyText(VOCABULARY))) == sorted([*range(256), EOS, 257, 258, 259])


def test_a_longer_option_stays_reachable_past_a_shorter_one() -> None:
    running = generation(constraints.options(TINY, ["a", "abc"]), vocabulary=TINY)
    assert allowed(running) == [0, 3, 5]
    running.accept(0)
    assert allowed(running) == [1, 4, 6, 7] and not running.finished
    running.accept(1)
    assert allowed(running) == [2]
    running.accept(2)
    assert running.finished


def test_min_tokens_keeps_the_end_out_as_long_as_anything_else_may_come() -> None:
    running = generation(AnyText(TINY), vocabulary=TINY, min_tokens=2)
    for _ in range(2):
        assert allowed(running) == [0, 1, 2, 3, 4, 5]
        running.accept(0)
    assert allowed(running) == [0, 1, 2, 3, 4, 5, 6, 7]
    short = generation(constraints.options(TINY, ["", "a"]), vocabulary=TINY, min_tokens=5)
    assert allowed(short) == [0]
    short.accept(0)
    assert short.finished, "a text that cannot go on ends however short it is"


def test_masks_with_and_without_the_end_have_different_names() -> None:
    running = generation(AnyText(VOCABULARY), min_tokens=1)
    before = running.mask_key()
    accept(running, "a")
    after = running.mask_key()
    assert None not in (before, after) and before != after
    assert after == generation(AnyText(VOCABULARY)).mask_key()


@pytest.mark.parametrize("pattern", ["[ab]{0,4}c", "(ab|a)*c", "[a-c]+"])
def test_equal_names_mean_equal_masks(pattern: str) -> None:
    rows: dict[Hashable, list[int]] = {}
    seen = 0
    todo: list[list[int]] = [[]]
    while todo and seen < 200:
        path = todo.pop(0)
        running = generation(constraints.regex(TINY, pattern), vocabulary=TINY, min_tokens=2, max_tokens=50)
        for token in path:
            running.accept(token)
        if running.finished:
            continue
        tokens = allowed(running)
        assert tokens and rows.setdefault(running.mask_key(), tokens) == tokens
        todo += [[*path, token] for token in tokens]
        seen += 1
    assert len(rows) < seen


def test_a_dead_end_leaves_the_end_only_and_says_so() -> None:
    running = generation(constraints.options(VOCABULARY, []))
    assert allowed(running) == [EOS]
    running.accept(EOS)
    assert running.finished and running.dead_end and running.tokens == [EOS]
    long_word = Vocabulary([b"a", b"bb", None], eos_token_ids=[2])
    stuck = generation(constraints.regex(long_word, "ab"), vocabulary=long_word, min_tokens=3)
    stuck.accept(0)
    assert allowed(stuck) == [2], "no token spells what must follow"


def test_a_token_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(ConstraintError, match="is not allowed here"):
        accept(generation(constraints.regex(VOCABULARY, "[ab]c")), "x")


# Forced runs.


def test_forced_tokens_are_taken_until_there_is_a_choice() -> None:
    running = generation(constraints.regex(VOCABULARY, "abc[de]fgh"))
    assert running.take_forced() == list(b"abc") and running.take_forced() == []
    accept(running, "d")
    assert running.take_forced() == list(b"fgh") and running.finished
    assert running.tokens == list(b"abcdfgh")


def test_forced_tokens_count_against_the_budget() -> None:
    running = generation(constraints.regex(VOCABULARY, "abcdef"), max_tokens=4)
    assert running.take_forced() == list(b"abcd") and running.finished


def test_forced_text_is_written_as_the_tokenizer_writes_it() -> None:
    running = generation(constraints.regex(VOCABULARY, "hello!"))
    assert running.take_forced() == VOCABULARY.tokenize("hello!") == [258, ord("!")]


# What the request asks for, and what a user's constraint may do.


def test_temperature_and_top_p_are_the_requests() -> None:
    running = generation(AnyText(VOCABULARY), temperature=0.5, top_p=0.9)
    assert (running.temperature, running.top_p) == (0.5, 0.9)
    assert (generation(AnyText(VOCABULARY)).temperature, generation(AnyText(VOCABULARY)).top_p) == (
        None,
        None,
    )


class Vowels(Constraint):
    """Made like a user's: it answers token by token and says nothing else."""

    def token_allowed(self, token: int) -> bool:
        return VOCABULARY.token_bytes(token) in (b"a", b"e", b"i", b"o", b"u")


def test_a_users_constraint_has_no_shared_mask() -> None:
    running = generation(Vowels(VOCABULARY))
    assert running.mask_key() is None
    assert allowed(running) == sorted([*b"aeiou", EOS])


class Broken(Constraint):
    def state_key(self) -> Hashable:
        raise OSError("no name")

    def mask_row(self) -> Any:
        raise OSError("no mask")


def test_a_mask_that_cannot_be_made_fails_its_own_branch_at_its_token() -> None:
    running = generation(Broken(VOCABULARY))
    assert running.mask_key() is None
    assert allowed(running) == [EOS], "the batch needs a row"
    with pytest.raises(OSError, match="no mask"):
        running.accept(EOS)


# Masked tokens.


def masked(*splices: Splice) -> MaskedToken:
    return MaskedToken(TokenSet.of([1, 3], VOCABULARY.size), list(splices))


def test_a_masked_token_is_one_token() -> None:
    sampling = masked()
    assert allowed(sampling) == [1, 3] and sampling.mask_key() is None and not sampling.finished
    assert sampling.take_forced() == []
    assert (sampling.temperature, sampling.top_p) == (None, None)
    sampling.accept(3)
    assert sampling.finished and sampling.token == 3 and sampling.matched() is None


def test_the_first_splice_that_matches_the_token_replaces_it() -> None:
    one, many, always = (
        Splice(when_sampled=[1], ff_tokens=[10]),
        Splice(when_sampled=[1, 3], ff_tokens=[11]),
        Splice(ff_tokens=[12]),
    )
    for token, splices, expected in [
        (1, [one, many], one),
        (3, [one, many], many),
        (3, [one], None),
        (3, [one, always], always),
        (1, [one, always], one),
    ]:
        sampling = masked(*splices)
        sampling.accept(token)
        assert sampling.matched() is expected
