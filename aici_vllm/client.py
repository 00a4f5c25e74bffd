"""Clients of a server's controllers: run, upload, tag; `Client` waits, `AsyncClient` is awaited."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
BASE_URL_VARIABLE = "AICI_API_BASE"
SOURCE_TYPE = "text/x-python"

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


_JSON_OUT = re.compile(r"^JSON-OUT: (.*)$", re.MULTILINE)


class ServerError(RuntimeError):
    """The server refused a request, or failed while it ran.

    Attributes:
        status: HTTP status; 500 for a run that broke off.
        message: what the server said.
    """

    def __init__(self, asked: str, status: int, message: str):
        self.status = status
        self.message = message
        super().__init__(f"bad response to {asked} {status}: {message}")


class RunRecord:
    """The result of a run, made from its events.

    Attributes:
        result: upstream's dict: `request`, `response` (all events); one per branch of `text`, `logs` and
            `json_out` (what its log lines `JSON-OUT: …` say); `raw_storage` (hex) and `storage` (text) of
            the variables; `error`, `usage`, `timing`, `tps`; and `results`, what the engine says at the end.
    """

    def __init__(self, request: dict[str, Any]):
        self._started = time.monotonic()
        self.result: dict[str, Any] = {
            "request": request,
            "response": [],
            "text": [],
            "logs": [],
            "json_out": [],
            "raw_storage": {},
            "storage": {},
            "error": None,
            "usage": {},
            "timing": {"http_response": 0.0, "data0": 0.0, "first_token": 0.0, "last_token": 0.0},
            "tps": {"prompt": 0.0, "sampling": 0.0},
            "results": None,
        }

    def begin(self) -> None:
        """The server has answered."""
        self._time("http_response")

    def add(self, event: Event) -> None:
        """One event of the stream.

        Raises:
            ServerError: the event says that the run broke off.
        """
        result = self.result
        result["response"].append(event)
        if len(result["response"]) == 1:
            self._time("data0")
        if "error" in event:
            raise ServerError("run", event["error"].get("code", 500), event["error"]["message"])
        for fork in event.get("forks", []):
            self._add_fork(fork)
        if event.get("usage"):
            before = result["usage"].get("sampled_tokens", 0)
            result["usage"] = event["usage"]
            if event["usage"]["sampled_tokens"] > before:
                self._time("last_token" if before else "first_token")
        result["results"] = event.get("results", result["results"])

    def finish(self) -> dict[str, Any]:
        """The result, once the stream has ended."""
        result, timing = self.result, self.result["timing"]
        result["json_out"] = [
            [_json_or_text(line) for line in _JSON_OUT.findall(log)] for log in result["logs"]
        ]
        result["storage"] = {
            name: bytes.fromhex(value).decode(errors="replace")
            for name, value in result["raw_storage"].items()
        }
        sampled = result["usage"].get("sampled_tokens", 0)
        computed = result["usage"].get("ff_tokens", 0)
        timing["last_token"] = max(timing["last_token"], timing["first_token"])
        if timing["first_token"]:
            result["tps"]["prompt"] = max(computed - sampled, 0) / timing["first_token"]
        if timing["last_token"] > timing["first_token"]:
            result["tps"]["sampling"] = (sampled - 1) / (timing["last_token"] - timing["first_token"])
        return result

    def _add_fork(self, fork: dict[str, Any]) -> None:
        result, index = self.result, fork["index"]
        while len(result["text"]) <= index:
            result["text"].append("")
            result["logs"].append("")
        result["text"][index] += fork["text"]
        result["logs"][index] += fork.get("logs", "")
        if fork.get("error") and result["error"] is None:
            result["error"] = fork["error"]
        for item in fork.get("storage", []):
            write = item["WriteVar"]
            earlier = result["raw_storage"].get(write["name"], "") if write["op"] == "Append" else ""
            result["raw_storage"][write["name"]] = earlier + write["value"]

    def _time(self, what: str) -> None:
        self.result["timing"][what] = time.monotonic() - self._started


def run_request(
    controller: str,
    controller_arg: Any = "",
    prompt: str = "",
    temperature: float | None = None,
    max_tokens: int | None = 200,
    **more: Any,
) -> dict[str, Any]:
    """The body of `POST /v1/run`.

    Args:
        controller: hash, tag, installed name, or source text.
        more: `messages`, `model`, `top_p`, `top_k`, `ignore_eos`.
    """
    body = {
        "controller": controller,
        "controller_arg": controller_arg,
        "prompt": prompt,
        "temperature": temperature,
        "max_tokens": max_tokens,
        **more,
    }
    return {name: value for name, value in body.items() if value is not None}


def _connection(base_url: str | None, api_key: str | None) -> tuple[str, dict[str, str]]:
    """Where the server is, and the headers that open it. `URL#key=KEY` carries the key along."""
    url, _, fragment = (base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL).partition("#")
    key = api_key or (fragment.removeprefix("key=") if fragment.startswith("key=") else None)
    headers = {"authorization": f"Bearer {key}", "api-key": key} if key else {}
    return url.rstrip("/") + "/", headers


def _refusal(asked: str, response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return ServerError(asked, response.status_code, message)


def _answer(asked: str, response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise _refusal(asked, response)
    return response.json()


def _json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _event(line: str) -> Event | None:
    data = line.removeprefix("data: ")
    return json.loads(data) if data != line and data != "[DONE]" else None


def _source(script: str | bytes | Path) -> bytes:
    if isinstance(script, Path):
        return script.read_bytes()
    return script.encode() if isinstance(script, str) else script


class Client:
    """A server's controllers.

    Args:
        base_url: `http://HOST:PORT/v1`, with `#key=KEY` for an API key; by default `$AICI_API_BASE`, or
            `http://127.0.0.1:8000/v1`.
        api_key: one of the server's keys.
        timeout: seconds that the server may be silent; None waits.
        http: arguments for `httpx.Client`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        **http: Any,
    ):
        url, headers = _connection(base_url, api_key)
        self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout, **http)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    @contextmanager
    def stream(self, controller: str, controller_arg: Any = "", **more: Any) -> Iterator[Iterator[Event]]:
        """The events of a run as they come; arguments as for `run_request`. Leaving the block ends the run.

        Raises:
            ServerError: the server refused the run.
        """
        body = run_request(controller, controller_arg, **more)
        with self.http.stream("POST", "run", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal("run", response)
            yield (event for line in response.iter_lines() if (event := _event(line)) is not None)

    def run_controller(
        self, controller: str, controller_arg: Any = "", *, on_event: OnEvent | None = None, **more: Any
    ) -> dict[str, Any]:
        """Run a controller to its end; arguments as for `run_request`, the result as in `RunRecord`.

        Raises:
            ServerError: the server refused the run, or it broke off.
        """
        record = RunRecord(run_request(controller, controller_arg, **more))
        with self.stream(controller, controller_arg, **more) as events:
            record.begin()
            for event in events:
                record.add(event)
                if on_event is not None:
                    on_event(event)
        return record.finish()

    def first_model(self) -> str:
        """The model that the server names first.

        Raises:
            ServerError: it names none.
        """
        return str(_answer("models", self.http.get("models"))["data"][0]["id"])

    def completion(self, body: dict[str, Any]) -> Iterator[Event]:
        """The chunks of `POST /v1/completions`, for servers without the routes of controllers.

        Raises:
            ServerError: the server refused the request.
        """
        with self.http.stream("POST", "completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal("completions", response)
            yield from (event for line in response.iter_lines() if (event := _event(line)) is not None)

    def upload_module(self, script: str | bytes | Path) -> dict[str, Any]:
        """Store a script; its `module_id` names it from now on.

        Raises:
            ServerError: the sandbox would not take it, or the server stores nothing.
        """
        headers = {"content-type": SOURCE_TYPE}
        response = self.http.post("controllers", content=_source(script), headers=headers)
        return dict(_answer("upload", response))

    def list_controllers(self) -> dict[str, Any]:
        """Everything that `controller` can name: `installed` and `stored`."""
        return dict(_answer("controllers", self.http.get("controllers")))

    def list_tags(self) -> list[dict[str, Any]]:
        """Every tag, the one that moved last first."""
        return list(_answer("tags", self.http.get("controllers/tags"))["tags"])

    def tag_module(self, module_id: str, tags: list[str]) -> list[dict[str, Any]]:
        """Make tags for a stored script, or move them there, all or none.

        Raises:
            ServerError: one of them belongs to somebody else, or is no tag.
        """
        body = {"module_id": module_id, "tags": tags}
        return list(_answer("tag", self.http.post("controllers/tags", json=body))["tags"])


class AsyncClient:
    """`Client` for asyncio: the same arguments and results, every method awaited."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        **http: Any,
    ):
        url, headers = _connection(base_url, api_key)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, **http)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()

    @asynccontextmanager
    async def stream(
        self, controller: str, controller_arg: Any = "", **more: Any
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """As `Client.stream`."""
        body = run_request(controller, controller_arg, **more)
        async with self.http.stream("POST", "run", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise _refusal("run", response)
            yield (event async for line in response.aiter_lines() if (event := _event(line)) is not None)

    async def run_controller(
        self, controller: str, controller_arg: Any = "", *, on_event: OnEvent | None = None, **more: Any
    ) -> dict[str, Any]:
        """As `Client.run_controller`."""
        record = RunRecord(run_request(controller, controller_arg, **more))
        async with self.stream(controller, controller_arg, **more) as events:
            record.begin()
            async for event in events:
                record.add(event)
                if on_event is not None:
                    on_event(event)
        return record.finish()

    async def upload_module(self, script: str | bytes | Path) -> dict[str, Any]:
        """As `Client.upload_module`."""
        headers = {"content-type": SOURCE_TYPE}
        response = await self.http.post("controllers", content=_source(script), headers=headers)
        return dict(_answer("upload", response))

    async def list_controllers(self) -> dict[str, Any]:
        """As `Client.list_controllers`."""
        return dict(_answer("controllers", await self.http.get("controllers")))

    async def list_tags(self) -> list[dict[str, Any]]:
        """As `Client.list_tags`."""
        return list(_answer("tags", await self.http.get("controllers/tags"))["tags"])

    async def tag_module(self, module_id: str, tags: list[str]) -> list[dict[str, Any]]:
        """As `Client.tag_module`."""
        body = {"module_id": module_id, "tags": tags}
        return list(_answer("tag", await self.http.post("controllers/tags", json=body))["tags"])
