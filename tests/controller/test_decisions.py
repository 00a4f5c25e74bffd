"""Decisions: what may be decided, how splices compose, and what the engine keeps of what a script made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.controller.decisions import BranchDecision, MidProcessResult, Splice, checked
from constraints import TokenSet

SIZE = 40
TOKENS = st.lists(st.integers(0, 9), max_size=6)
SPLICES = st.builds(Splice, backtrack=st.integers(0, 8), ff_tokens=TOKENS)


def done(splice: Splice, tokens: list[int]) -> list[int]:
    """`tokens` after the splice, by its definition."""
    return tokens[: len(tokens) - splice.backtrack] + splice.ff_tokens


# Splices.


def test_the_worked_example_of_composition() -> None:
    splice = Splice(backtrack=0, ff_tokens=[1, 2])
    splice.add_splice(Splice(backtrack=5, ff_tokens=[9]))
    assert splice == Splice(backtrack=3, ff_tokens=[9])


@given(st.lists(SPLICES, min_size=1, max_size=5))
def test_a_composed_splice_does_what_its_parts_do_one_after_the_other(parts: list[Splice]) -> None:
    start = list(range(100, 150))
    expected = start
    for part in parts:
        expected = done(part, expected)
    composed, *others = copy.deepcopy(parts)
    for other in others:
        composed.add_splice(other)
    assert done(composed, start) == expected
    assert others == parts[1:], "the added splices are untouched"


def test_a_conditional_splice_takes_more_but_adds_to_nothing() -> None:
    conditional = Splice(when_sampled=[3], backtrack=1, ff_tokens=[4])
    with pytest.raises(ValueError, match="only an unconditional splice"):
        Splice(ff_tokens=[]).add_splice(conditional)
    conditional.add_splice(Splice(backtrack=2, ff_tokens=[5]))
    assert conditional == Splice(when_sampled=[3], backtrack=2, ff_tokens=[5])


@pytest.mark.parametrize("tokens", [(1, 2), "ab", None, ["a"], [-1], [1.0], 5])
@pytest.mark.parametrize("name", ["ff_tokens", "when_sampled"])
def test_tokens_are_a_list_of_ids(name: str, tokens: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a list of token ids"):
        Splice(**{"ff_tokens": [], name: tokens})


@pytest.mark.parametrize("backtrack", [-1, "1", 1.5, None])
def test_backtrack_is_a_count(backtrack: Any) -> None:
    with pytest.raises(ValueError, match="backtrack must be 0 or more"):
        Splice(backtrack=backtrack, ff_tokens=[])


# Branches and results.


def test_a_branch_splices_once_or_samples() -> None:
    mask, plain, conditional = (
        TokenSet(SIZE),
        Splice(ff_tokens=[1]),
        Splice(when_sampled=[1], ff_tokens=[]),
    )
    assert BranchDecision(splices=[plain]).is_splice() and BranchDecision.noop().is_splice()
    assert not BranchDecision(sample_mask=mask).is_splice()
    assert not BranchDecision(sample_mask=mask, splices=[plain]).is_splice()
    for splices in [], [conditional], [plain, plain]:
        with pytest.raises(ValueError, match="needs exactly one splice with empty when_sampled"):
            BranchDecision(splices=splices)


@pytest.mark.parametrize(
    "branch, says",
    [
        ({"splices": [5]}, "splices must be a list of Splice, not"),
        ({"splices": (Splice(ff_tokens=[]),)}, "splices must be a list of Splice, not"),
        ({"sample_mask": [1, 2]}, "sample_mask must be a TokenSet, not list"),
    ],
)
def test_a_branch_is_made_of_splices_and_a_mask(branch: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        BranchDecision(**branch)


@pytest.mark.parametrize("branches", [None, BranchDecision.noop(), [5], "ab", (BranchDecision.noop(),)])
def test_a_result_is_a_list_of_branches(branches: Any) -> None:
    with pytest.raises(TypeError, match="branches must be a list of Branch, not"):
        MidProcessResult(branches)


def test_the_short_ways_to_say_it() -> None:
    mask = TokenSet.of([3], SIZE)
    assert MidProcessResult.bias(mask).branches == [BranchDecision(sample_mask=mask)]
    spliced = MidProcessResult.splice(2, [7])
    assert spliced.branches == [BranchDecision(splices=[Splice(backtrack=2, ff_tokens=[7])])]
    assert MidProcessResult.noop().branches == [BranchDecision(splices=[Splice(ff_tokens=[])])]
    assert MidProcessResult.stop() == MidProcessResult([]) and not MidProcessResult.stop().skip_me
    assert MidProcessResult.skip().skip_me
    splices = [MidProcessResult.splice(0, []), MidProcessResult.noop()]
    others = [MidProcessResult.bias(mask), MidProcessResult.stop(), MidProcessResult.skip()]
    assert all(result.is_splice() for result in splices)
    assert not any(result.is_splice() for result in others)
    assert not MidProcessResult([BranchDecision.noop()] * 2).is_splice()


# What the engine gets.


def samples(*tokens: int, size: int = SIZE, splices: list[Splice] | None = None) -> BranchDecision:
    return BranchDecision(sample_mask=TokenSet.of(tokens, size), splices=splices or [])


def test_the_engine_keeps_a_copy() -> None:
    made = [samples(3, splices=[Splice(when_sampled=[3], ff_tokens=[4])]), BranchDecision.noop()]
    expected = copy.deepcopy(made)
    kept = checked(made, SIZE)
    assert kept == expected
    assert made[0].sample_mask is not None
    made[0].sample_mask.set_all(True)
    made[0].splices[0].ff_tokens.append(5)
    made[0].splices[0].when_sampled.append(5)
    made[0].splices.clear()
    made.clear()
    assert kept == expected


def test_what_a_script_spoils_after_making_it_is_found() -> None:
    spoiled = BranchDecision.noop()
    spoiled.splices[0].ff_tokens.append("a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ff_tokens must be a list of token ids"):
        checked([spoiled], SIZE)
    with pytest.raises(TypeError, match="branches must be a list of Branch"):
        checked([spoiled, 5], SIZE)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "branch, says",
    [
        (BranchDecision(splices=[Splice(ff_tokens=[SIZE])]), f"token id over the vocabulary's {SIZE}"),
        (samples(size=SIZE), "sample_mask allows no token"),
        (samples(1, size=SIZE - 1), f"sample_mask is over {SIZE - 1} tokens and the vocabulary has {SIZE}"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_said(branch: BranchDecision, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked([BranchDecision.noop(), branch], SIZE)
