"""Awaits: each hands itself to whoever drives the coroutine, and returns what it is told."""

from __future__ import annotations

import pytest

from aici_vllm.controller.awaits import (
    Awaitable,
    Decide,
    Decided,
    FixedText,
    Generate,
    GetPrompt,
    Stop,
    WaitVars,
)
from aici_vllm.controller.decisions import MidProcessResult
from constraints import AnyText
from tests.controller.scripts import VOCABULARY

AWAITS = [
    FixedText([1, 2]),
    Generate(AnyText(VOCABULARY), max_tokens=3),
    Decide(MidProcessResult.stop()),
    WaitVars(("x",)),
    GetPrompt(),
    Stop(),
]


@pytest.mark.parametrize("awaited", AWAITS, ids=lambda awaited: type(awaited).__name__)
def test_the_driver_gets_the_await_itself_and_gives_the_result(awaited: Awaitable) -> None:
    async def controller() -> object:
        return await awaited

    coroutine = controller()
    assert coroutine.send(None) is awaited
    with pytest.raises(StopIteration) as returned:
        coroutine.send("the result")
    assert returned.value.value == "the result"


@pytest.mark.parametrize("awaited", AWAITS, ids=lambda awaited: type(awaited).__name__)
def test_the_driver_can_raise_at_the_await(awaited: Awaitable) -> None:
    async def controller() -> object:
        try:
            return await awaited
        except KeyError as error:
            return error.args

    coroutine = controller()
    coroutine.send(None)
    with pytest.raises(StopIteration) as returned:
        coroutine.throw(KeyError("x"))
    assert returned.value.value == ("x",)


def test_what_is_not_asked_for_is_left_to_the_request() -> None:
    request = Generate(AnyText(VOCABULARY), max_tokens=3)
    assert (request.min_tokens, request.stop_at, request.store_var, request.shared) == (0, None, None, False)
    assert (request.temperature, request.top_p) == (None, None)
    assert FixedText([1]).following is None


def test_what_came_of_a_decision_names_its_parts() -> None:
    decided = Decided(branch=1, backtrack=2, tokens=[3])
    assert decided == (1, 2, [3])
