"""The clients against a server that answers from a table: what they send, and what they make of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import aici_vllm
from aici_vllm.client import AsyncClient, Client, ServerError

USAGE = {"sampled_tokens": 1, "ff_tokens": 4, "cost": 6, "spliced_tokens": 2, "forward_passes": 1}


def run_event(index: int, text: str, sampled: int = 1, **more: Any) -> dict[str, Any]:
    """An event of one branch."""
    fork = {"index": index, "text": text, "parts": [], "logs": "", "storage": [], "error": "", **more}
    return {"object": "run", "forks": [fork], "usage": {**USAGE, "sampled_tokens": sampled}}


def write(name: str, value: bytes, op: str) -> dict[str, Any]:
    return {"WriteVar": {"name": name, "value": value.hex(), "op": op, "when_version_is": None}}


EVENTS: list[dict[str, Any]] = [
    {"id": "run-1", "object": "initial-run", "created": 1, "model": "m"},
    run_event(0, "Hel", 0, logs="one\n", storage=[write("a", b"1", "Set"), write("b", b"x", "Append")]),
    run_event(2, "third", logs='JSON-OUT: {"k": [1]}\nJSON-OUT: broken\n'),
    run_event(0, "lo ↩ p", 2, storage=[write("a", b"2", "Append"), write("b", b"\xff", "Set")]),
    run_event(0, "", 3, finish_reason="fail", error="ValueError: no"),
    {**run_event(2, "", 4, finish_reason="aici-stop", error="later"), "results": {"branches": []}},
]


def stream(events: list[dict[str, Any]]) -> httpx.Response:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


class Table:
    """A server: path → answer; it notes what it was asked."""

    def __init__(self, answers: dict[str, httpx.Response]):
        self.answers = answers
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        return self.answers[f"{request.method} {request.url.path}"]


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """`ask(table, "method", …)` calls a method of either client, made with `base_url` and `api_key`."""

    def ask_sync(table: Table, method: str, *args: Any, base_url: str | None = None, **more: Any) -> Any:
        with Client(base_url, transport=httpx.MockTransport(table)) as client:
            return getattr(client, method)(*args, **more)

    def ask_async(table: Table, method: str, *args: Any, base_url: str | None = None, **more: Any) -> Any:
        async def call() -> Any:
            async with AsyncClient(base_url, transport=httpx.MockTransport(table)) as client:
                return await getattr(client, method)(*args, **more)

        return asyncio.run(call())

    return ask_sync if request.param == "sync" else ask_async


def test_a_run_becomes_upstreams_dict(ask: Ask) -> None:
    table, seen = Table({"POST /v1/run": stream(EVENTS)}), list[dict[str, Any]]()
    found = ask(table, "run_controller", "tag", {"x": 1}, prompt="p", temperature=0.5, on_event=seen.append)
    sent = {
        "controller": "tag",
        "controller_arg": {"x": 1},
        "prompt": "p",
        "temperature": 0.5,
        "max_tokens": 200,
    }
    assert json.loads(table.asked[0].content) == found["request"] == sent
    assert seen == found["response"] == EVENTS
    assert found["text"] == ["Hello ↩ p", "", "third"]
    assert found["logs"] == ["one\n", "", 'JSON-OUT: {"k": [1]}\nJSON-OUT: broken\n']
    assert found["json_out"] == [[], [], [{"k": [1]}, "broken"]]
    assert found["raw_storage"] == {"a": "3132", "b": "ff"}
    assert found["storage"] == {"a": "12", "b": "\ufffd"}
    assert found["error"] == "ValueError: no"
    assert found["usage"]["sampled_tokens"] == 4
    assert found["results"] == {"branches": []}
    timing = found["timing"]
    assert 0 < timing["http_response"] <= timing["data0"] <= timing["first_token"] <= timing["last_token"]
    assert found["tps"].keys() == {"prompt", "sampling"}


def test_a_refusal_is_an_error_with_its_status(ask: Ask) -> None:
    for body, said in [
        ({"json": {"error": {"message": "no such tag"}}}, "no such tag"),
        ({"json": {"error": "Unauthorized"}}, "Unauthorized"),
        ({"text": "Bad gateway"}, "Bad gateway"),
    ]:
        table = Table({"POST /v1/run": httpx.Response(401, **body)})  # type: ignore[arg-type]
        with pytest.raises(ServerError, match=f"bad response to run 401: {said}") as caught:
            ask(table, "run_controller", "x")
        assert caught.value.status == 401 and isinstance(caught.value, RuntimeError)


def test_a_run_that_breaks_off_is_an_error(ask: Ask) -> None:
    broken = stream([*EVENTS[:2], {"error": {"message": "the engine died", "code": 500}}])
    with pytest.raises(ServerError, match="the engine died"):
        ask(Table({"POST /v1/run": broken}), "run_controller", "x")


def test_scripts_are_uploaded_as_python(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "s.py"
    path.write_text("grüße")
    table = Table({"POST /v1/controllers": httpx.Response(200, json={"module_id": "ab"})})
    for script in ("grüße", "grüße".encode(), path):
        assert ask(table, "upload_module", script) == {"module_id": "ab"}
        assert table.asked[-1].content == "grüße".encode()
        assert table.asked[-1].headers["content-type"] == "text/x-python"


def test_tags_and_controllers(ask: Ask) -> None:
    table = Table(
        {
            "GET /v1/controllers": httpx.Response(200, json={"installed": [], "stored": []}),
            "GET /v1/controllers/tags": httpx.Response(200, json={"tags": [{"tag": "a"}]}),
            "POST /v1/controllers/tags": httpx.Response(200, json={"tags": [{"tag": "b"}]}),
        }
    )
    assert ask(table, "list_controllers") == {"installed": [], "stored": []}
    assert ask(table, "list_tags") == [{"tag": "a"}]
    assert ask(table, "tag_module", "ab", ["b"]) == [{"tag": "b"}]
    assert json.loads(table.asked[-1].content) == {"module_id": "ab", "tags": ["b"]}


def test_the_base_url_may_carry_a_key(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"GET /x/v1/controllers": httpx.Response(200, json={})}
    for source in ("argument", "environment"):
        url = "http://host:1/x/v1/#key=se=cret"
        monkeypatch.setenv("AICI_API_BASE", url if source == "environment" else "http://other")
        table = Table(answer)
        ask(table, "list_controllers", base_url=None if source == "environment" else url)
        assert table.asked[0].headers["authorization"] == "Bearer se=cret"
        assert table.asked[0].headers["api-key"] == "se=cret"
        assert str(table.asked[0].url) == "http://host:1/x/v1/controllers"


def test_the_clients_are_public_names() -> None:
    assert aici_vllm.Client is Client and aici_vllm.AsyncClient is AsyncClient
