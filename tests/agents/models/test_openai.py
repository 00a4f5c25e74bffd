"""The OpenAI-compatible clients against a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aici_vllm.agents import (
    AIEmbed,
    AIGenerate,
    AIMessage,
    AsyncOpenAIModel,
    ModelCallError,
    OpenAIModel,
    RetryConfig,
    UserMessage,
    last_output,
    run,
    run_async,
)


class Server(ThreadingHTTPServer):
    """Answers chat completions with what was asked, and records every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.arrived = threading.Semaphore(0)
        self.released = threading.Event()
        self.released.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, dict(self.headers)))
        self.server.arrived.release()
        self.server.released.wait(20)
        status, answer = self.answer(body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        special: dict[str, tuple[int, Any]] = {
            "missing": (404, {"error": {"message": "no such model"}}),
            "html": (200, b"<html>"),
            "list": (200, []),
            "empty": (200, {"choices": []}),
            "odd": (200, {"object": "x"}),
        }
        if body["model"] in special:
            return special[body["model"]]
        if self.path == "/v1/embeddings":
            vectors = [{"index": i, "embedding": [float(len(t)), i]} for i, t in enumerate(body["input"])]
            return 200, {"data": vectors[::-1]}
        choices = [self.choice(body, number) for number in range(body.get("n", 1))]
        return 200, {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 5}}

    def choice(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        text = None if body["model"] == "silent" else f"{number}: {body['messages'][-1]['content']}"
        logprobs = (
            {"content": [{"logprob": -1.0 - number}, {"logprob": -0.5}]} if body.get("logprobs") else None
        )
        message = {"role": "assistant", "content": text}
        return {"index": number, "message": message, "finish_reason": "stop", "logprobs": logprobs}

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def test_a_request_and_its_reply(server: Server) -> None:
    model = OpenAIModel("m", base_url=server.url, api_key="key", headers={"X-Extra": "1"})
    conversation = model([UserMessage("Hi {{who}}")], who="Bob", api_kwargs={"top_p": 0.5}, return_all=True)
    assert [message.content for message in conversation] == [
        "Act as a helpful AI assistant",
        "Hi Bob",
        "0: Hi Bob",
    ]
    assert conversation[-1] == AIMessage("0: Hi Bob", finish_reason="stop", tokens=(7, 5))
    ((path, body, headers),) = server.requests
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Act as a helpful AI assistant"},
            {"role": "user", "content": "Hi Bob"},
        ],
        "top_p": 0.5,
        "stream": False,
    }
    assert headers["Authorization"] == "Bearer key"
    assert headers["X-Extra"] == "1"
    model.close()
    model.close()


def test_several_replies_with_log_probabilities(server: Server) -> None:
    model = OpenAIModel("m", base_url=server.url + "/v1/")
    replies = model([UserMessage("u")], api_kwargs={"n": 2, "logprobs": True}, no_system_message=True)[1:]
    assert [(r.content, r.sample_id, r.log_prob) for r in replies] == [("1: u", 2, -2.5), ("0: u", 1, -1.5)]  # type: ignore[union-attr]


def test_a_lazy_call(server: Server) -> None:
    call = AIGenerate(
        OpenAIModel("m", base_url=server.url), "u", api_kwargs={"n": 2}, config=RetryConfig(n_samples=2)
    )
    run(call)
    assert len(server.requests) == 1
    assert server.requests[0][1]["temperature"] == 0.701
    assert [node.data[-1].content for node in call.samples.children] == ["0: u", "1: u"]
    run(call, model="other", http_kwargs={"headers": {"X-Run": "2"}})
    assert server.requests[1][1]["model"] == "other"
    assert server.requests[1][2]["X-Run"] == "2"


def test_embeddings(server: Server) -> None:
    model = OpenAIModel("m", base_url=server.url)
    assert model.embed(["a", "bcd"]) == [[1.0, 0], [3.0, 1]]
    assert server.requests[0][:2] == ("/v1/embeddings", {"model": "m", "input": ["a", "bcd"]})
    call = AIEmbed(model, "four")
    assert last_output(run(call)) == [4.0, 0]


def test_a_reply_without_text(server: Server) -> None:
    assert OpenAIModel("silent", base_url=server.url)([UserMessage("u")])[-1].content == ""


@pytest.mark.parametrize(
    ("name", "text", "status"),
    [
        ("missing", "HTTP 404", 404),
        ("html", "did not answer with JSON: <html>", 200),
        ("list", "JSON object", 200),
        ("empty", "no choices", None),
        ("odd", "chat completions", None),
    ],
)
def test_answers_that_are_errors(server: Server, name: str, text: str, status: int | None) -> None:
    with pytest.raises(ModelCallError, match=text) as caught:
        OpenAIModel(name, base_url=server.url)([UserMessage("u")])
    assert caught.value.status == status

    async def asynchronously() -> None:
        model = AsyncOpenAIModel(name, base_url=server.url)
        try:
            await model([UserMessage("u")])
        finally:
            await model.close()

    with pytest.raises(ModelCallError, match=text):
        asyncio.run(asynchronously())


def test_embeddings_that_are_none(server: Server) -> None:
    with pytest.raises(ModelCallError, match="embeddings"):
        OpenAIModel("odd", base_url=server.url).embed(["a"])


def test_no_server() -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(ModelCallError, match="No answer from"):
        OpenAIModel("m", base_url=url)([UserMessage("u")])


def test_timeout(server: Server) -> None:
    server.released.clear()
    with pytest.raises(ModelCallError, match="Timeout"):
        OpenAIModel("m", base_url=server.url)([UserMessage("u")], http_kwargs={"timeout": 0.05})


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    OpenAIModel("m")([UserMessage("u")])
    assert server.requests[0][2]["Authorization"] == "Bearer from-env"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert OpenAIModel("m").base_url == "https://api.openai.com/v1"
    assert "Authorization" not in OpenAIModel("m", api_key="")._headers


def test_samples_in_parallel(server: Server) -> None:
    server.released.clear()

    async def main() -> AIGenerate:
        model = AsyncOpenAIModel("m", base_url=server.url)
        call = AIGenerate("u", model=model, config=RetryConfig(n_samples=3))
        task = asyncio.create_task(run_async(call))
        for _ in range(3):  # all three are at the server before any is answered
            assert await asyncio.to_thread(server.arrived.acquire, timeout=20)
        server.released.set()
        await task
        await model.close()
        return call

    call = asyncio.run(main())
    assert len(call.samples.children) == 3
    assert sorted(body["temperature"] for _, body, _ in server.requests) == [0.701, 0.702, 0.703]


def test_cancelling_a_request(server: Server) -> None:
    server.released.clear()

    async def main() -> None:
        model = AsyncOpenAIModel("m", base_url=server.url)
        call = AIGenerate(model, "u")
        task = asyncio.create_task(run_async(call))
        assert await asyncio.to_thread(server.arrived.acquire, timeout=20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.success is False
        server.released.set()
        assert (await run_async(call)).success is True
        assert await model.embed(["abc"]) == [[3.0, 0]]
        await model.close()

    asyncio.run(main())
