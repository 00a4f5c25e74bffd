"""Asynchronous runs and retries: the samples of a round in parallel, with progress and cancellation."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from aici_vllm.agents.calls import AICall
from aici_vllm.agents.messages import Conversation
from aici_vllm.agents.retry import Evaluation, RetryLoop
from aici_vllm.agents.rounds import AsyncSampler, SampleRound, collecting, samples_of
from aici_vllm.agents.samples import SampleNode

AsyncCondition: TypeAlias = Callable[[AICall], bool | Awaitable[bool]]
AsyncFeedback: TypeAlias = str | Callable[[AICall], str | Awaitable[str]]


@dataclass(frozen=True)
class Progress:
    """How far a round is: requests finished of those sent, and samples they brought."""

    finished: int
    requests: int
    samples: int


class ParallelSampler:
    """Sends the requests of a round at once, at most `max_concurrency` at a time.

    Samples are handed over in the order of the requests, so the tree does not depend on which reply came
    first. When a request fails, the others still finish and their samples are kept; when the round is
    cancelled, requests in flight are cancelled and the finished ones are kept. Functions that are not
    asynchronous run in threads, which a cancellation does not stop.
    """

    def __init__(
        self, max_concurrency: int | None = None, progress: Callable[[Progress], None] | None = None
    ) -> None:
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}.")
        self.max_concurrency = max_concurrency
        self.progress = progress

    async def sample_async(self, round: SampleRound) -> AsyncIterator[Conversation]:
        """Yield the samples in the order of the requests, then raise the first failure if there was one."""
        wanted_samples = min(round.n_samples, round.calls_left)
        per_request = max(1, int(round.api_kwargs.get("n") or 1))
        collected, sent = 0, 0
        while collected < wanted_samples:
            count = math.ceil((wanted_samples - collected) / per_request)
            async for conversation in self._batch(round, range(sent + 1, sent + count + 1)):
                yield conversation
                collected += 1
            sent += count

    async def _batch(self, round: SampleRound, numbers: range) -> AsyncIterator[Conversation]:
        gate = asyncio.Semaphore(self.max_concurrency or len(numbers))
        tasks = [asyncio.create_task(_request(round, number, gate)) for number in numbers]
        interrupted: BaseException | None = None
        try:
            await self._watch(tasks)
        except BaseException as error:
            interrupted = error
            await _cancel(tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is None:
                for conversation in task.result():
                    yield conversation
        if interrupted is not None:
            raise interrupted
        for task in tasks:
            task.result()

    async def _watch(self, tasks: list[asyncio.Task[list[Conversation]]]) -> None:
        """Wait for all requests and report each that finishes."""
        pending, samples = set(tasks), 0
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            samples += sum(len(task.result()) for task in done if task.exception() is None)
            if self.progress is not None:
                self.progress(Progress(len(tasks) - len(pending), len(tasks), samples))


async def _request(round: SampleRound, number: int, gate: asyncio.Semaphore) -> list[Conversation]:
    async with gate:
        result = round.call(number) if _is_async(round) else await asyncio.to_thread(round.call, number)
        return samples_of(await result if inspect.isawaitable(result) else result)


def _is_async(round: SampleRound) -> bool:
    """Whether the function, or the model behind it, is asynchronous and may be called on the event loop."""
    candidates = (round.func, round.schema, round.kwargs.get("model"))
    return any(
        inspect.iscoroutinefunction(candidate) or inspect.iscoroutinefunction(type(candidate).__call__)
        for candidate in candidates
        if candidate is not None
    )


async def _cancel(tasks: list[asyncio.Task[list[Conversation]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_async(
    aicall: AICall,
    verbose: int = 1,
    catch_errors: bool | None = None,
    *,
    sampler: AsyncSampler | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_concurrency: int | None = None,
    **kwargs: Any,
) -> AICall:
    """`run`, with the round's requests in parallel.

    `progress` is called after each finished request. Cancelling keeps the samples that are finished and
    leaves the call in order, with `success` False. `sampler`, or the call's own, replaces the parallel
    sampler; it takes no `progress` and no `max_concurrency`.
    """
    await _run_round(aicall, verbose, catch_errors, sampler, progress, max_concurrency, None, kwargs)
    return aicall


async def _run_round(
    call: AICall,
    verbose: int,
    catch_errors: bool | None,
    sampler: AsyncSampler | None,
    progress: Callable[[Progress], None] | None,
    max_concurrency: int | None,
    condition: Callable[[AICall], Any] | None,
    kwargs: dict[str, Any],
) -> None:
    chosen = _sampler_for(sampler or call.sampler, progress, max_concurrency)
    with collecting(call, verbose, catch_errors, condition, kwargs) as collection:
        async for conversation in chosen.sample_async(collection.round):
            collection.add(conversation)


def _sampler_for(
    given: Any, progress: Callable[[Progress], None] | None, max_concurrency: int | None
) -> AsyncSampler:
    """The given sampler, else a parallel one, to which the other arguments belong."""
    if given is None:
        return ParallelSampler(max_concurrency, progress)
    name = type(given).__name__
    if not hasattr(given, "sample_async"):
        raise TypeError(f"{name} is not an asynchronous sampler; use run and airetry.")
    if progress is not None or max_concurrency is not None:
        raise ValueError(f"progress and max_concurrency are for the parallel sampler and not for {name}.")
    chosen: AsyncSampler = given
    return chosen


async def evaluate_condition_async(
    condition: AsyncCondition,
    aicall: AICall,
    feedback: AsyncFeedback = "",
    *,
    evaluate_all: bool = True,
    feedback_expensive: bool = False,
) -> tuple[bool, SampleNode]:
    """`evaluate_condition`, for conditions and feedback functions that may be asynchronous."""
    with Evaluation(condition, aicall, feedback, evaluate_all, feedback_expensive) as evaluation:
        for ask in evaluation.questions():
            answer = ask(aicall)
            evaluation.answer = await answer if inspect.isawaitable(answer) else answer
    return evaluation.result()


async def airetry_async(
    condition: AsyncCondition,
    aicall: AICall,
    feedback: AsyncFeedback = "",
    *,
    verbose: int = 1,
    throw: bool = False,
    evaluate_all: bool = True,
    feedback_expensive: bool = False,
    max_retries: int | None = None,
    retry_delay: float | None = None,
    sampler: AsyncSampler | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_concurrency: int | None = None,
) -> AICall:
    """`airetry`, with each round's requests in parallel; conditions and feedback may be asynchronous."""
    loop = RetryLoop(aicall, verbose, throw, max_retries, retry_delay)
    while loop.settle(
        *await evaluate_condition_async(
            condition, aicall, feedback, evaluate_all=evaluate_all, feedback_expensive=feedback_expensive
        )
    ):
        await asyncio.sleep(loop.retry_delay)
        aicall.config.retries += 1
        await _run_round(aicall, loop.verbose, None, sampler, progress, max_concurrency, condition, {})
    return aicall
