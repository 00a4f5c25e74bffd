"""Calls over HTTP: what the server is sent, what is made of its answers, and how many are open at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aici_vllm.recursive import EngineCallError, ServerEngine
from aici_vllm.recursive.in_engine.engine import EngineCall
from aici_vllm.recursive.in_engine.program import Plan
from tests.recursive.in_engine.scripted_engine import decode, encode, template

CALL = EngineCall(Plan([("x", True)]), prompt=(1, 2), sampling=(("temperature", 0.0),))


class Handler(BaseHTTPRequestHandler):
    """Tokenizes bytes, and runs every call to the same end; the model's name asks for trouble."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        with self.server.lock:
            self.server.open += 1
            self.server.most = max(self.server.most, self.server.open)
        status, answer = getattr(self, self.path.rpartition("/")[2])(body)
        payload = json.dumps(answer).encode()
        with self.server.lock:
            self.server.open -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def tokenize(self, body: Any) -> tuple[int, Any]:
        text = template(body["messages"]) if "messages" in body else body["prompt"]
        return 200, {"tokens": encode(text), "max_model_len": 300}

    def detokenize(self, body: Any) -> tuple[int, Any]:
        return 200, {"prompt": decode(body["tokens"])}

    def completions(self, body: Any) -> tuple[int, Any]:
        if body["model"] == "missing":
            return 404, {"error": {"message": "no such model"}}
        if body["model"] == "plain":
            return 200, {"choices": [{"text": "hello"}]}
        outcome = {"reason": "stop", "prompt_tokens": 5, "spent": 7, "reply_tokens": 2}
        branch = {"index": 0, "text": "", "token_ids": [1, 2, 3], "sources": [["sampled", 3]]}
        branch |= {"finish_reason": "stop", "error": None, "logs": "", "checkpoint": None}
        names = ("sampled_tokens", "spliced_tokens", "forward_passes", "computed_tokens", "discarded_rows")
        found = {
            "branches": [branch],
            "variables": {"outcome": json.dumps(outcome), "reply": "ok"},
            "variables_base64": {},
            "usage": dict.fromkeys(names, 0),
        }
        return 200, {"kv_transfer_params": {"controller": found}}

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.open, server.most, server.lock = [], 0, 0, threading.Lock()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def send(served: Any, *calls: EngineCall, model: str = "m", **options: Any) -> list[Any]:
    async def go() -> list[Any]:
        engine = ServerEngine(f"http://127.0.0.1:{served.server_port}/v1", model, **options)
        try:
            await engine.frame()
            return await asyncio.gather(*(engine.send(call) for call in calls))
        finally:
            await engine.aclose()

    return asyncio.run(go())


def test_a_call_as_the_server_gets_it(served: Any) -> None:
    (answer,) = send(served, CALL, api_key="secret")
    assert (answer.text, answer.added) == ("ok", (1, 2, 3))
    path, authorization, body = served.seen[-1]
    assert (path, authorization) == ("/v1/completions", "Bearer secret")
    assert body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 298,
        "temperature": 0.0,
        "vllm_xargs": {"controller": "recursive", "controller_arg": CALL.plan.as_json()},
    }


def test_a_call_that_goes_on_sends_no_tokens(served: Any) -> None:
    send(served, EngineCall(CALL.plan, (), (), "new", "tree/1/0", "tree/1", "other"))
    body = served.seen[-1][2]
    assert (body["prompt"], body["model"]) == ("", "other")
    names = ("controller_checkpoint", "controller_from", "controller_drop")
    assert [body["vllm_xargs"][name] for name in names] == ["new", "tree/1/0", "tree/1"]


def test_only_so_many_requests_are_open(served: Any) -> None:
    answers = send(served, *[CALL] * 40, open_requests=3)
    assert len(answers) == 40 and served.most <= 3


def test_the_frame_and_its_heads_are_asked_for_once(served: Any) -> None:
    async def go() -> None:
        engine = ServerEngine(f"http://127.0.0.1:{served.server_port}", "m")
        try:
            first, second = await asyncio.gather(engine.frame(), engine.frame())
            assert first is second and first.between["assistant", "user"] == "<end>U:"
            assert engine.context == 300
            asked = len(served.seen)
            assert [await engine.token_ids("S:") for _ in range(3)] == [tuple(b"S:")] * 3
            assert len(served.seen) == asked + 1
        finally:
            await engine.aclose()

    asyncio.run(go())


@pytest.mark.parametrize(
    "model, message",
    [("missing", "answered 404: .*no such model"), ("plain", "start it with `aici serve`")],
)
def test_servers_that_cannot_do_it_are_clear_errors(served: Any, model: str, message: str) -> None:
    with pytest.raises(EngineCallError, match=message):
        send(served, CALL, model=model)
