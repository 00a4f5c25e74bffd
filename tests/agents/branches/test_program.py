"""What ends a reply, against `find` on the whole text after every token."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aici_vllm.agents.branches.program import BranchPlan, Outcome, Reply, branches_of, find_stop, outcome_of
from aici_vllm.controller.group import Group
from aici_vllm.controller.program import NativeProgram
from tests.agents.branches.fake_llm import EOS, encode, vocabulary
from tests.controller.fake_engine import FakeEngine


def fed(text: str, **plan: Any) -> tuple[int, Reply]:
    """A reply after as many bytes of `text` as it takes, and how many these are."""
    reply = Reply(BranchPlan("", (0.0,), None, 1000, **plan))
    reply.vocabulary = vocabulary()
    for taken, token in enumerate(encode(text)):
        if reply.eos_forced():
            return taken, reply
        reply.append_token(token)
    return len(encode(text)), reply


@pytest.mark.parametrize("seed", range(40))
def test_stop_texts(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("abü", k=30))
    stops = tuple("".join(rng.choices("abü", k=rng.randint(1, 4))) for _ in range(2))
    prefixes = [text[:end] for end in range(1, len(text) + 1)]
    ended = next((prefix for prefix in prefixes if any(stop in prefix for stop in stops)), None)
    taken, reply = fed(text, stop=stops)
    outcome = reply.outcome(encode(text)[:taken])
    if ended is None:
        assert outcome == Outcome("length", 0, None)
    else:
        first = min(ended.find(stop) for stop in stops if stop in ended)
        assert (outcome.reason, outcome.cut, taken) == ("stop", first, len(encode(ended)))


def test_stops_wait_for_the_minimum() -> None:
    taken, reply = fed("aXbXc", stop=("X",), min_tokens=2)
    assert (taken, reply.outcome([88]).cut) == (4, 3)
    assert fed("aXbXc", stop=("X",), keep_stop=True)[1].outcome([88]).cut == 2


def test_find_stop() -> None:
    assert find_stop("abcab", ["b", "ab"]) == (0, 2)
    assert find_stop("abcab", ["ab"], start=2) == (3, 5)
    assert find_stop("abcab", ["bca"], start=2) == (1, 4)
    assert find_stop("abcab", ["x"]) is None and find_stop("abcab", []) is None


def test_stop_tokens_end_a_reply_and_are_not_part_of_it() -> None:
    x = ord("x")
    taken, reply = fed("abxc", stop_token_ids=(x,))
    assert (taken, reply.outcome([97, 98, x])) == (3, Outcome("stop", 1, None))
    _, reply = fed("abxc", stop_token_ids=(x,), keep_stop=True)
    assert reply.outcome([97, 98, x]) == Outcome("stop", 0, None)
    # A token without a text cannot be shown, so it is not kept either.
    _, reply = fed("ab<end>", stop_token_ids=(EOS,), keep_stop=True)
    assert reply.outcome([97, 98, EOS]) == Outcome("stop", 1, None)
    forced = Reply(BranchPlan("", (0.0,), None, 9, stop_token_ids=(x,), shape=("choice", ["no"])))
    forced.vocabulary = vocabulary()
    assert forced.token_allowed(x) and forced.mask_row()[x // 32] >> x % 32 & 1


def test_the_end_of_sequence_is_not_part_of_a_reply() -> None:
    _, reply = fed("ab")
    assert reply.outcome([97, 98, EOS]) == Outcome("stop", 1, None)
    assert reply.outcome([97, 98]) == Outcome("length", 0, None)


def test_a_shape_ends_a_reply() -> None:
    taken, reply = fed("red!", shape=("choice", ["red", "blue"]))
    assert (taken, reply.outcome(encode("red"))) == (3, Outcome("stop", 0, None))


def ran(prompt: str, plan: BranchPlan, **limits: int) -> tuple[Group, FakeEngine]:
    """The request of a plan, over; its branches write `a` for as long as they may."""
    group = Group(vocabulary(), encode(prompt), max_tokens=100, context=100)
    engine = FakeEngine(group, choose=lambda branch, allowed: 97 if 97 in allowed else allowed[0])
    engine.run(lambda branch: NativeProgram(branches_of(plan), "", branch))
    assert [branch.error for branch in group.branches] == [None] * len(group.branches)
    return group, engine


def test_branches_sample_from_the_first_step_on() -> None:
    group, engine = ran("U:hi<end>A:", BranchPlan("tail", (0.0, 0.5, 1.0), 4, 100))
    assert [engine.text(branch) for branch in group.branches] == ["tailaaaa"] * 3
    assert engine.steps == 4


def test_a_branch_ends_with_its_reply_and_not_with_what_closed_it() -> None:
    group, _ = ran("A:", BranchPlan("", (0.0,), 4, 100, stop_token_ids=(97,)))
    assert group.root.sequence.tokens == encode("A:")
    assert group.variables.get(outcome_of(0)) == b'["stop", 1, null]'


def test_without_branches_the_prompt_is_computed_and_nothing_stays_behind_it() -> None:
    group, engine = ran("A:", BranchPlan("tail", (), None, 100))
    assert engine.steps == 1
    assert group.root.sequence.tokens == encode("A:tail")
