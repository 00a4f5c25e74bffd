"""Calls of a round that are held at their questions."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aici_vllm.agents import AIGenerate, Conversation, Reply, RetryConfig, UserMessage, aigenerate
from aici_vllm.agents.branches.questions import BranchModel, Questions
from aici_vllm.agents.rounds import start_round


def questions(func: Any = aigenerate, n_samples: int = 2, **kwargs: Any) -> Questions:
    call = AIGenerate("u", config=RetryConfig(n_samples=n_samples))
    call.func = func
    return Questions(start_round(call, kwargs), BranchModel(random.Random(1)))


def test_all_calls_ask_before_one_is_answered() -> None:
    held = questions(n_samples=3, api_kwargs={"n": 2})
    assert held.begin()
    assert [asked.request.api_kwargs["temperature"] for asked in held.open()] == [0.701, 0.702]
    for number, asked in enumerate(held.open()):
        asked.replies += [Reply(f"{number}.{index}") for index in range(asked.request.n)]
    held.answered()
    assert held.open() == []
    assert [sample[-1].content for sample in held.samples()] == ["0.0", "0.1", "1.0", "1.1"]
    assert not held.begin()


def test_an_error_arrives_where_the_function_asked() -> None:
    def careful(conversation: Conversation, model: Any, **kwargs: Any) -> Any:
        async def ask() -> Any:
            try:
                return await model(conversation, **kwargs)
            except ConnectionError:
                return await model([UserMessage("again")], **kwargs)

        return ask()

    held = questions(careful, n_samples=1)
    held.begin()
    held.open()[0].error = ConnectionError()
    held.answered()
    (again,) = held.open()
    assert again.request.prompt[-1].content == "again"
    again.error = TimeoutError("slow")
    held.answered()
    with pytest.raises(TimeoutError, match="slow"):
        list(held.samples())


def test_a_function_may_await_nothing_else() -> None:
    async def sleepy(conversation: Conversation, **kwargs: Any) -> Any:
        import asyncio

        await asyncio.sleep(0)

    held = questions(sleepy)
    with pytest.raises(TypeError, match="awaits its model"):
        held.begin()
    held.close()
