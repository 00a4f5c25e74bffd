"""The coroutine backend gives what the threaded one gives."""

import asyncio

import pytest

from aici_vllm.recursive import AsyncChildRLMBackend, BackendLimits, LocalRLMRunner
from aici_vllm.recursive.async_backends import LIVE_CHILDREN_PER_DEPTH


async def chat(messages, model=None):
    await asyncio.sleep(0)
    if len(messages) == 1:
        if messages[0]["content"] == "bad":
            raise RuntimeError("kaput")
        return messages[0]["content"].upper()
    if "Broken" in messages[1]["content"]:
        raise RuntimeError("child down")
    return "```repl\nprint(FINAL('child'))\n```"


def backend(chat_fn=chat, strict=False, **limits):
    return AsyncChildRLMBackend(
        chat_fn,
        runner_factory=LocalRLMRunner,
        system_prompt="SP",
        max_iterations=2,
        env_max_iterations_multiplier=5,
        limits=BackendLimits(**limits),
        strict=strict,
    )


def test_queries_and_batches():
    made = backend(result_truncation_limit=3)
    assert asyncio.run(made.query("hello")) == "HEL"
    assert asyncio.run(made.query_batched(["a", "bad", "c"])) == ["A", "Error: kaput", "C"]
    assert asyncio.run(made.query_batched([])) == []


def test_children_totals_and_traces():
    made = backend(max_depth=2, max_children_total=2)
    answers = asyncio.run(made.recursive_query_batched(["x", "Broken", "y"]))
    assert answers == ["child", "Error: child down", "Error: max_children_total exceeded"]
    assert sorted(str(trace.error) for trace in made.child_traces) == ["None", "child down"]


def test_depth_and_caps_are_the_same():
    assert asyncio.run(backend(max_depth=1).recursive_query("x")) == "X"
    capped = backend(max_depth=1, max_children_per_batch=1)
    assert asyncio.run(capped.recursive_query_batched(["x", "y"])) == ["X"]
    strict = backend(max_depth=1, max_children_per_batch=1, strict=True)
    assert asyncio.run(strict.recursive_query_batched(["x", "y"])) == [
        "X",
        "Error: max_children_per_batch exceeded",
    ]
    with pytest.raises(ValueError, match="max_children_per_batch"):
        asyncio.run(backend(max_children_per_batch=0).recursive_query_batched(["x"]))


def test_a_large_batch_of_children_keeps_its_sandboxes_bounded():
    live, most = 0, 0

    async def counting(messages, model=None):
        nonlocal live, most
        live += 1
        most = max(most, live)
        await asyncio.sleep(0)
        live -= 1
        return "```repl\nprint(FINAL('child'))\n```"

    made = backend(counting, max_depth=2)
    answers = asyncio.run(made.recursive_query_batched([f"task {n}" for n in range(200)]))
    assert answers == ["child"] * 200
    assert 1 < most <= LIVE_CHILDREN_PER_DEPTH
