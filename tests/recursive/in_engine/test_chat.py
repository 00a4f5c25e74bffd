"""The chat function of an engine, alone and as what a runner takes its backends from."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aici_vllm.recursive import EngineBackend, EngineChat, LocalRLMRunner, Usage
from tests.recursive.in_engine.scripted_engine import ScriptedEngine


def test_a_plain_call_is_a_chat_function() -> None:
    engine = ScriptedEngine(lambda seen: f"{len(seen)} characters")
    reply: Any = asyncio.run(
        EngineChat(engine)([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    )
    assert reply == "18 characters" and engine.prompts == ["S:a<end>U:b<end>A:"]
    assert reply.usage == Usage(10, 0, 14)


def test_settings_reach_the_calls() -> None:
    engine = ScriptedEngine(lambda seen: "word " * 9)
    chat = EngineChat(engine, query_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    asyncio.run(chat([{"role": "user", "content": "b"}], "a model"))
    (call,) = engine.calls
    assert call.plan.max_tokens == 7 and call.model == "a model"
    assert dict(call.sampling) == {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert EngineChat(engine).settings.sampling == {"temperature": 0.0}


def test_a_runner_makes_engine_backends_with_its_own_limits() -> None:
    engine = ScriptedEngine(lambda seen: "```repl\nFINAL(rlm_query('x'))\n```" if seen[0] == "S" else "leaf")
    seen: list[str] = []
    runner = LocalRLMRunner(
        EngineChat(engine),
        system_prompt="rules",
        max_depth=2,
        max_children_total=1,
        result_truncation_limit=2,
        on_subcall_start=lambda depth, model, prompt: seen.append(f"{depth} {prompt}"),
    )
    result = asyncio.run(runner.arun("context", "task"))
    assert result.final_answer == "le" and seen == ["1 x"]
    backend = runner._make_backend(True)
    assert isinstance(backend, EngineBackend) and backend.limits.max_children_total == 1


def test_a_synchronous_run_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="use arun"):
        LocalRLMRunner(EngineChat(ScriptedEngine(str))).run("context", "task")


def test_other_objects_are_no_engines() -> None:
    with pytest.raises(TypeError, match=r"takes a vllm\.LLM, an AsyncLLM or a ServerEngine, not str"):
        EngineChat("http://localhost")
