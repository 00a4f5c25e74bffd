"""Tokens followed from place to place do what tokens told to the constraint one by one do."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import constraints
from aici_vllm import aici
from aici_vllm.controller.awaits import Generate
from aici_vllm.controller.branch import Branch, Next
from aici_vllm.controller.group import Group
from aici_vllm.controller.program import Controller, NativeProgram
from aici_vllm.controller.sampling import Generation
from aici_vllm.controller.stops import Stops
from constraints import AnyText, Constraint
from constraints.guidance import GuidanceConstraint
from constraints.machine import MachineConstraint
from constraints.place import MAX_LINKS, Places
from tests.controller.fake_engine import FakeEngine
from tests.controller.scripts import EOS, VOCABULARY

WORDS = r"([A-Z]?[a-z]+( [a-z0-9]+)*[,.;!?]? )*"
SCHEMA = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}


class NoDigits(Constraint):
    """A user's own constraint, which has no places."""

    def token_allowed(self, token: int) -> bool:
        return super().token_allowed(token) and not VOCABULARY.token_bytes(token).isdigit()


async def words() -> None:
    await aici.gen_tokens(regex=WORDS, max_tokens=60)


async def anything() -> None:
    await aici.gen_tokens(max_tokens=30)
    await aici.FixedTokens("hello")
    await aici.gen_tokens(stop_at="ab", max_tokens=30)


async def json() -> None:
    aici.set_var("json", await aici.gen_text(json_schema=SCHEMA, max_tokens=60))


async def forced_in_between() -> None:
    label = aici.Label()
    await aici.gen_tokens(regex=r"(<b>[a-z]{2,4}</b>,)*", max_tokens=80)
    await aici.FixedTokens("!", following=label)
    await aici.gen_tokens(options=["hello world", "hell", "hex"])


async def one_constraint_twice() -> None:
    constraint = constraints.regex(VOCABULARY, r"([a-z]+=\d+;)*")
    for _ in range(2):
        aici.set_var("kept", await aici.gen_text(constraint=constraint, max_tokens=10))


async def identifiers() -> None:
    lexer = constraints.DynamicLexer(VOCABULARY)
    lexer.add("ab")
    lexer.add("abc")
    await aici.gen_tokens(constraint=lexer.constraint(), max_tokens=20)


async def own_class() -> None:
    await aici.gen_tokens(constraint=NoDigits(), max_tokens=20)


async def forks() -> None:
    await aici.fork(3)
    await aici.gen_tokens(regex=WORDS, max_tokens=20)


def group(**settings: Any) -> Group:
    return Group(VOCABULARY, [ord("p")], **{"max_tokens": 150, "context": 1000, **settings})


def outcome(group: Group) -> list[tuple[Any, ...]]:
    found = [
        (
            b.sequence.tokens,
            bytes(b.sequence.origins),
            b.sequence.sampled,
            b.finish_reason,
            b.error,
            str(b.log),
        )
        for b in group.branches
    ]
    return [*found, *sorted(group.variables._values.items())]


Step = tuple[int, int, list[int]]
"""A branch, the token it sampled, and those it might have sampled."""


def told_one_by_one(controller: Controller, seed: int, **settings: Any) -> tuple[list[Step], Any]:
    """A run in which every token is told to the constraint, and what it did."""
    chance, steps = random.Random(seed), []

    def choose(branch: Branch, allowed: list[int]) -> int:
        ends = [token for token in allowed if token == EOS]
        token = chance.choice(ends) if ends and chance.random() < 0.05 else chance.choice(allowed)
        steps.append((branch.index, token, allowed))
        return token

    engine = FakeEngine(group(**settings), choose=choose)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (AnyText, MachineConstraint, GuidanceConstraint):
            patch.setattr(kind, "place", lambda self, variant=None: None)
        engine.run(lambda branch: NativeProgram(controller, "", branch))
    return steps, outcome(engine.group)


def followed(controller: Controller, steps: list[Step], ask: float, **settings: Any) -> tuple[int, Any]:
    """The same tokens with places, asking for masks now and then: how many were followed, and the outcome."""
    chance, running = random.Random(0), group(**settings)
    engine = FakeEngine(running)
    running.start(lambda branch: NativeProgram(controller, "", branch))
    known = 0
    while any(branch.next is Next.FORK for branch in running.live):
        engine._fork()
    for index, token, allowed in steps:
        branch = running.branches[index]
        if chance.random() < ask:
            assert engine.allowed(branch) == allowed
        branch.sequence.kept = len(branch.sequence)
        before = branch.sampling
        assert before is not None
        place = before.place
        branch.accept(token)
        known += place is not None and branch.sampling is before and before.place is not None
        running.wake()
    return known, outcome(running)


CASES: list[tuple[Controller, dict[str, Any], bool]] = [
    (words, {}, True),
    (words, {"min_tokens": 25}, True),
    (words, {"max_tokens": 12}, True),
    (words, {"stops": Stops(("ab",), frozenset(), shown=False, min_tokens=0)}, False),
    (anything, {}, True),
    (anything, {"min_tokens": 40}, True),
    (json, {}, True),
    (forced_in_between, {}, True),
    (one_constraint_twice, {}, True),
    (identifiers, {}, False),
    (own_class, {}, False),
    (forks, {}, True),
]


@pytest.mark.parametrize("controller, settings, has_places", CASES)
def test_followed_tokens_do_what_told_tokens_do(
    controller: Controller, settings: dict[str, Any], has_places: bool
) -> None:
    total = 0
    for seed in range(12):
        steps, expected = told_one_by_one(controller, seed, **settings)
        for ask in (0.0, 0.2, 1.0):
            known, found = followed(controller, steps, ask, **settings)
            assert found == expected
            total += known
    assert bool(total) == has_places


def test_a_constraint_can_be_taken_back_after_it_was_moved() -> None:
    for make in (
        lambda: constraints.regex(VOCABULARY, WORDS),
        lambda: constraints.json_schema(VOCABULARY, SCHEMA),
    ):
        text = b"abc de" if isinstance(make(), MachineConstraint) else b'[{"a": "xy"}'
        told, moved = make(), make()
        keys, places = [told.state_key()], []
        for token in text:
            told.append_token(token)
            keys.append(told.state_key())
            places.append(told.place())
        moved.move(list(text[:-1]), places[-2].state)  # type: ignore[union-attr]
        moved.append_token(text[-1])
        for count in range(len(text), 0, -1):
            assert moved.state_key() == keys[count]
            assert np.array_equal(moved.mask_row(), told.mask_row())
            moved.rollback(1)
            told.rollback(1)


def test_places_are_bounded_and_found_again() -> None:
    places = Places(lambda state, token: (int(state) + token) % 7)
    here = places.at(0)
    for token in range(3 * MAX_LINKS):
        after = here.onward.get(token) or here.find(token)
        assert after is not None and after is places.at((int(here.state) + token) % 7)  # type: ignore[call-overload]
        here = after
    assert sum(len(places.at(state).onward) for state in range(7)) <= MAX_LINKS


def test_drafts_are_looked_at_from_where_the_followed_tokens_led() -> None:
    written = list(b"p")
    request = Generate(constraints.regex(VOCABULARY, WORDS), max_tokens=50)
    following = Generation(request, VOCABULARY, written=written)
    told = Generation(Generate(constraints.regex(VOCABULARY, WORDS), max_tokens=50), VOCABULARY)
    following.follow(100)
    for token in b"Ab cd":
        assert following.place is not None
        following.place = following.place.find(token)
        written.append(token)
        told.accept(token)
    for drafts in (list(b"e, F"), list(b"e,,"), [-1]):
        found, expected = following.ahead(drafts), told.ahead(drafts)
        assert [one.mask_key() for one in found] == [one.mask_key() for one in expected]
        assert all(np.array_equal(a.mask_row(), b.mask_row()) for a, b in zip(found, expected, strict=True))
    assert following.tokens == told.tokens and following.place is not None
