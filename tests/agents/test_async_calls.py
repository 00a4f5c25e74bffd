"""Asynchronous runs and retries: parallel requests, order, progress, cancellation, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from aici_vllm.agents import (
    AICall,
    AIGenerate,
    AIMessage,
    Conversation,
    ParallelSampler,
    Progress,
    RetryBudgetExceeded,
    RetryConfig,
    SampleRound,
    ScriptedModel,
    airetry,
    airetry_async,
    attach_replies,
    evaluate_condition_async,
    last_output,
    pre_order,
    render,
    run,
    run_async,
)
from aici_vllm.agents.models.base import Reply


class Gated:
    """An asynchronous model whose replies wait until the test lets them through, by request number."""

    def __init__(self) -> None:
        self.gates: dict[int, asyncio.Future[str]] = {}
        self.arrived: asyncio.Queue[int] = asyncio.Queue()
        self.cancelled: list[int] = []
        self.api_kwargs: list[dict[str, Any]] = []

    async def __call__(self, conversation: Conversation, **kwargs: Any) -> Conversation:
        number = len(self.gates) + 1
        self.api_kwargs.append(kwargs["api_kwargs"])
        self.gates[number] = asyncio.get_running_loop().create_future()
        self.arrived.put_nowait(number)
        try:
            text = await self.gates[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        replies = [Reply(text)] * kwargs["api_kwargs"].get("n", 1)
        return attach_replies(render(conversation, kwargs), replies)

    async def wait_for(self, count: int) -> None:
        for _ in range(count):
            await self.arrived.get()


def run_test(body: Callable[[Gated], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await body(Gated())

    asyncio.run(main())


def answers(call: AICall) -> list[str]:
    return [node.data[-1].content for node in call.samples.children]


def test_requests_run_in_parallel_and_samples_keep_the_order_of_requests() -> None:
    async def body(model: Gated) -> None:
        call = AICall(model, "x", config=RetryConfig(n_samples=3))
        reports: list[Progress] = []
        task = asyncio.create_task(run_async(call, progress=reports.append))
        await model.wait_for(3)
        for number in (3, 1, 2):
            model.gates[number].set_result(f"reply {number}")
        assert await task is call
        assert answers(call) == ["reply 1", "reply 2", "reply 3"]
        assert call.active_sample_id == call.samples.children[-1].id
        assert call.success is True
        assert call.config.calls == 3
        assert [kwargs["temperature"] for kwargs in model.api_kwargs] == [0.701, 0.702, 0.703]
        assert reports[-1] == Progress(finished=3, requests=3, samples=3)

    run_test(body)


def test_progress_comes_after_each_request() -> None:
    async def body(model: Gated) -> None:
        reports: asyncio.Queue[Progress] = asyncio.Queue()
        call = AICall(model, "x", api_kwargs={"n": 2}, config=RetryConfig(n_samples=4))
        task = asyncio.create_task(run_async(call, progress=reports.put_nowait))
        await model.wait_for(2)
        model.gates[2].set_result("b")
        assert await reports.get() == Progress(1, 2, 2)
        assert not task.done()
        model.gates[1].set_result("a")
        assert await reports.get() == Progress(2, 2, 4)
        await task
        assert answers(call) == ["a", "a", "b", "b"]

    run_test(body)


def test_max_concurrency() -> None:
    async def body(model: Gated) -> None:
        call = AICall(model, "x", config=RetryConfig(n_samples=3))
        task = asyncio.create_task(run_async(call, max_concurrency=2))
        await model.wait_for(2)
        assert model.arrived.empty()
        model.gates[2].set_result("b")
        await model.wait_for(1)
        model.gates[1].set_result("a")
        model.gates[3].set_result("c")
        await task
        assert answers(call) == ["a", "b", "c"]

    run_test(body)
    with pytest.raises(ValueError, match="max_concurrency"):
        ParallelSampler(0)


def test_the_budget_of_calls_bounds_the_requests() -> None:
    async def body(model: Gated) -> None:
        call = AICall(model, "x", config=RetryConfig(n_samples=5, max_calls=2))
        task = asyncio.create_task(run_async(call))
        await model.wait_for(2)
        for gate in model.gates.values():
            gate.set_result("a")
        await task
        assert len(model.gates) == call.config.calls == 2
        await run_async(call)
        assert len(model.gates) == 2

    run_test(body)


def test_cancelling_stops_requests_and_keeps_what_is_finished() -> None:
    async def body(model: Gated) -> None:
        finished: asyncio.Queue[Progress] = asyncio.Queue()
        call = AICall(model, "x", config=RetryConfig(n_samples=3))
        task = asyncio.create_task(run_async(call, progress=finished.put_nowait))
        await model.wait_for(3)
        model.gates[2].set_result("b")
        await finished.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(model.cancelled) == [1, 3]
        assert answers(call) == ["b"]
        assert call.success is False
        assert call.error is None
        assert call.config.calls == 1
        again = asyncio.create_task(run_async(call))
        await model.wait_for(3)
        for number in (4, 5, 6):
            model.gates[number].set_result("later")
        await again
        assert call.success is True

    run_test(body)


@pytest.mark.parametrize("catching", [True, False])
def test_a_failed_request_leaves_the_others(catching: bool) -> None:
    async def body(model: Gated) -> None:
        call = AICall(model, "x", config=RetryConfig(n_samples=3, catch_errors=catching))
        task = asyncio.create_task(run_async(call))
        await model.wait_for(3)
        model.gates[2].set_exception(ConnectionError("down"))
        model.gates[3].set_result("c")
        model.gates[1].set_result("a")
        if catching:
            await task
        else:
            with pytest.raises(ConnectionError):
                await task
        assert answers(call) == ["a", "c"]
        assert call.success is False
        assert isinstance(call.error, ConnectionError)
        assert len(call.conversation) == 1

    run_test(body)


def test_a_progress_function_that_raises() -> None:
    async def body(model: Gated) -> None:
        def broken(progress: Progress) -> None:
            raise ZeroDivisionError

        call = AICall(model, "x", config=RetryConfig(n_samples=2))
        task = asyncio.create_task(run_async(call, progress=broken))
        await model.wait_for(2)
        model.gates[1].set_result("a")
        with pytest.raises(ZeroDivisionError):
            await task
        assert model.cancelled == [2]
        assert answers(call) == ["a"]

    run_test(body)


def test_plain_functions_run_in_threads() -> None:
    threads: set[str] = set()
    together = threading.Barrier(2, timeout=30)

    def model(conversation: Conversation, **kwargs: Any) -> Conversation:
        threads.add(threading.current_thread().name)
        together.wait()
        return [*conversation, AIMessage("a")]

    call = AICall(model, "x", config=RetryConfig(n_samples=2))
    asyncio.run(run_async(call))
    assert answers(call) == ["a", "a"]
    assert len(threads) == 2
    assert threading.current_thread().name not in threads


def test_an_asynchronous_model_behind_a_lazy_kind() -> None:
    async def body(model: Gated) -> None:
        call = AIGenerate("Hi {{name}}", name="Bob", model=model)
        task = asyncio.create_task(run_async(call))
        await model.wait_for(1)
        model.gates[1].set_result("a")
        await task
        assert [message.content for message in call.conversation][1:] == ["Hi Bob", "a"]
        assert list(call.kwargs) == ["model"]

    run_test(body)


REPLIES = ["Blue", "Red", "blue", "red", "blue", "blue", "yellow", "yellow"]


def shape(call: AICall) -> list[tuple[Any, ...]]:
    return [
        (node.wins, node.visits, node.success, node.feedback, [message.content for message in node.data])
        for node in pre_order(call.samples)
    ]


def fresh() -> AICall:
    return AIGenerate(ScriptedModel(REPLIES), "x", config=RetryConfig(n_samples=2), api_kwargs={"n": 2})


def lowercase(call: AICall) -> bool:
    return bool(last_output(call).islower())


def starts_with_y(call: AICall) -> bool:
    return bool(last_output(call).startswith("y"))


def test_retries_grow_the_same_tree_as_synchronous_ones() -> None:
    expected = run(fresh())
    airetry(lowercase, expected, "lower")
    airetry(starts_with_y, expected, lambda call: f"not {last_output(call)}")

    async def asynchronously() -> AICall:
        async def condition(call: AICall) -> bool:
            await asyncio.sleep(0)
            return starts_with_y(call)

        async def feedback(call: AICall) -> str:
            await asyncio.sleep(0)
            return f"not {last_output(call)}"

        call = await run_async(fresh())
        await airetry_async(lowercase, call, "lower")
        return await airetry_async(condition, call, feedback)

    call = asyncio.run(asynchronously())
    assert shape(call) == shape(expected)
    assert call.config == expected.config
    assert last_output(call) == "yellow"


def test_retry_budget_and_expensive_feedback() -> None:
    async def main() -> AICall:
        call = await run_async(AIGenerate(ScriptedModel("xyz"), "p"))
        with pytest.raises(RetryBudgetExceeded):
            await airetry_async(
                starts_with_y,
                call,
                lambda shown: f"{last_output(shown)} again",
                max_retries=0,
                throw=True,
                feedback_expensive=True,
            )
        return call

    call = asyncio.run(main())
    assert call.samples.children[0].feedback == "\nx again"
    with pytest.raises(RuntimeError, match="not been run"):
        asyncio.run(airetry_async(lowercase, AIGenerate("x")))


def test_a_condition_that_raises_restores_the_call() -> None:
    call = run(fresh())
    before = call.copy()

    async def condition(shown: AICall) -> bool:
        if last_output(shown) == "Red":
            raise KeyError("x")
        return False

    with pytest.raises(KeyError):
        asyncio.run(evaluate_condition_async(condition, call, "F"))
    assert call == before


def test_an_asynchronous_sampler() -> None:
    rounds: list[SampleRound] = []

    class Branches:
        async def sample_async(self, round: SampleRound) -> AsyncIterator[Conversation]:
            rounds.append(round)
            for text in ("a", "y"):
                yield [*round.conversation, AIMessage(text)]

    async def main() -> AICall:
        call = AIGenerate("x", sampler=Branches())
        await run_async(call)
        return await airetry_async(lambda c: c.config.calls > 2, call)

    call = asyncio.run(main())
    assert [round.condition is None for round in rounds] == [True, False]
    assert len(call.samples) == 5


def test_samplers_of_the_wrong_kind_are_refused() -> None:
    class Synchronous:
        def sample(self, round: SampleRound) -> Any:
            return iter(())

    call = AIGenerate("x", sampler=Synchronous())
    with pytest.raises(TypeError, match="Synchronous is not an asynchronous sampler"):
        asyncio.run(run_async(call))
    with pytest.raises(TypeError, match="ParallelSampler is an asynchronous sampler"):
        run(call, sampler=ParallelSampler())  # type: ignore[arg-type]
    for option in ({"progress": print}, {"max_concurrency": 2}):
        with pytest.raises(ValueError, match="are for the parallel sampler"):
            asyncio.run(run_async(call, sampler=ParallelSampler(), **option))  # type: ignore[arg-type]
    assert call.success is None
