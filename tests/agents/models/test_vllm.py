"""The vLLM models against stand-ins for the engine that give real vLLM outputs; no engine is started."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from aici_vllm.agents import (
    AIGenerate,
    AsyncVLLMModel,
    ModelCallError,
    RetryConfig,
    UserMessage,
    VLLMModel,
    last_output,
    run,
    run_async,
)
from aici_vllm.agents.models.vllm import sampling_params

vllm = pytest.importorskip("vllm")


def output(texts: list[str]) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    replies = [
        CompletionOutput(index, text, (1, 2, 3), -1.5 - index, None, finish_reason="stop")
        for index, text in enumerate(texts)
    ]
    return RequestOutput("id", None, [5, 6], None, replies, finished=True)


class FakeLLM:
    """Answers as `vllm.LLM` does; `test_signatures` checks that the real one takes these calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def chat(self, messages: Any, sampling_params: Any, **options: Any) -> list[Any]:
        self.calls.append((messages, sampling_params, options))
        if sampling_params.seed == 13:
            raise ValueError("prompt too long")
        return [output([f"reply {i}" for i in range(sampling_params.n)])]

    def embed(self, texts: list[str], *, use_tqdm: bool) -> list[Any]:
        if not texts[0]:
            raise ValueError("not an embedding model")
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=(float(len(text)),))) for text in texts]


class FakeEngine:
    """Answers as `AsyncLLM` does: a renderer for chats, and a generator of outputs per request."""

    def __init__(self) -> None:
        self.renderer = self
        self.rendered: list[Any] = []
        self.requests: list[tuple[Any, Any, str]] = []
        self.aborted: list[str] = []
        self.hold: asyncio.Event | None = None

    async def render_chat_async(self, conversations: Any, chat_params: Any) -> tuple[list[Any], list[Any]]:
        self.rendered.append((conversations, chat_params))
        return conversations, [{"prompt_token_ids": [5, 6]}]

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        self.requests.append((prompt, sampling_params, request_id))
        try:
            if sampling_params.seed == 13:
                raise ValueError("dead")
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        if sampling_params.seed != 14:
            yield output([f"{request_id.rsplit('-', 1)[1]}.{i}" for i in range(sampling_params.n)])


def test_signatures() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    inspect.signature(vllm.LLM.chat).bind(None, [], None, use_tqdm=False, chat_template="x")
    inspect.signature(vllm.LLM.embed).bind(None, ["x"], use_tqdm=False)
    inspect.signature(AsyncLLM.generate).bind(None, {}, None, "id")
    from vllm.renderers.base import BaseRenderer

    inspect.signature(BaseRenderer.render_chat_async).bind(None, [[]], None)


def test_chat() -> None:
    llm = FakeLLM()
    model = VLLMModel(llm, sampling={"top_k": 5, "temperature": 0.2}, chat_options={"chat_template": "t"})
    call = AIGenerate(model, "Hi {{who}}", who="Bob", api_kwargs={"n": 2}, config=RetryConfig(n_samples=2))
    run(call)
    ((messages, params, options),) = llm.calls
    assert messages[1] == {"role": "user", "content": "Hi Bob"}
    assert (params.n, params.top_k, params.temperature, params.max_tokens) == (2, 5, 0.701, None)
    assert options == {"use_tqdm": False, "chat_template": "t"}
    replies = [node.data[-1] for node in call.samples.children]
    assert [(r.content, r.log_prob, r.finish_reason, r.tokens) for r in replies] == [
        ("reply 1", -2.5, "stop", (2, 3)),
        ("reply 0", -1.5, "stop", (2, 3)),
    ]


def test_failures() -> None:
    model = VLLMModel(FakeLLM())
    with pytest.raises(ModelCallError, match="ValueError: prompt too long"):
        model([UserMessage("u")], api_kwargs={"seed": 13})
    with pytest.raises(ModelCallError, match="embed"):
        model.embed([""])
    assert model.embed(["abc"]) == [[3.0]]


def test_sampling_params() -> None:
    params = sampling_params({"max_completion_tokens": 9, "logprobs": True, "top_logprobs": 3, "stop": ["x"]})
    assert (params.max_tokens, params.logprobs, params.stop) == (9, 3, ["x"])
    assert sampling_params({"logprobs": False}).logprobs is None
    assert sampling_params({"logprobs": 2}).logprobs == 2
    with pytest.raises(ValueError, match=r"\['nope'\]"):
        sampling_params({"nope": 1})


def test_response_format() -> None:
    schema = {"type": "object"}
    sent = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert sampling_params({"response_format": sent}).structured_outputs.json == schema
    assert (
        sampling_params({"response_format": {"type": "json_object"}}).structured_outputs.json_object is True
    )
    assert sampling_params({"response_format": {"type": "text"}}).structured_outputs is None
    with pytest.raises(ValueError, match="response_format"):
        sampling_params({"response_format": {"type": "other"}})


def test_async_samples_in_parallel() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.hold = asyncio.Event()
        model = AsyncVLLMModel(engine, chat_template="t", chat_template_kwargs={"think": False})
        call = AIGenerate(model, "u", api_kwargs={"n": 2}, config=RetryConfig(n_samples=4))
        task = asyncio.create_task(run_async(call))
        while len(engine.requests) < 2:
            await asyncio.sleep(0)
        engine.hold.set()
        await task
        # Replies are sorted by their log-probability, the best last.
        assert [node.data[-1].content for node in call.samples.children] == ["1.1", "1.0", "2.1", "2.0"]
        conversations, chat_params = engine.rendered[0]
        assert conversations[0][1] == {"role": "user", "content": "u"}
        assert chat_params.chat_template == "t"
        assert chat_params.chat_template_kwargs["add_generation_prompt"] is True
        assert chat_params.chat_template_kwargs["think"] is False
        prompt, params, request_id = engine.requests[0]
        assert prompt == {"prompt_token_ids": [5, 6]}
        assert params.output_kind.name == "FINAL_ONLY"
        assert request_id != engine.requests[1][2]

    asyncio.run(main())


def test_async_cancellation_aborts_the_request() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.hold = asyncio.Event()
        call = AIGenerate(AsyncVLLMModel(engine), "u")
        task = asyncio.create_task(run_async(call))
        while not engine.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.aborted == [engine.requests[0][2]]
        engine.hold.set()
        await run_async(call)
        assert last_output(call) == "2.0"

    asyncio.run(main())


def test_async_failures() -> None:
    async def main() -> None:
        model = AsyncVLLMModel(FakeEngine())
        with pytest.raises(ModelCallError, match="dead"):
            await model([UserMessage("u")], api_kwargs={"seed": 13})
        with pytest.raises(ModelCallError, match="without an output"):
            await model([UserMessage("u")], api_kwargs={"seed": 14})

    asyncio.run(main())
