"""vLLM's own server shell (errors, API keys) around our routes, with an engine that says what it is told."""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from aici_vllm.controller.limits import Limits
from aici_vllm.server import routes
from aici_vllm.server.catalog import Catalog
from aici_vllm.server.errors import UnknownControllerError, bad_request
from aici_vllm.server.protocol import RunRequest
from aici_vllm.server.runs import Rendered
from aici_vllm.server.settings import ServerSettings
from aici_vllm.server.store import Store

INSTALLED = {"greet": "package.module:greet"}
SCRIPT = "import aici\nasync def main():\n    await aici.FixedTokens('Hello')\naici.start(main())\n"

USAGE = {
    "sampled_tokens": 2,
    "computed_tokens": 5,
    "spliced_tokens": 3,
    "forward_passes": 2,
    "discarded_rows": 0,
}


def fork(index: int = 0, *changes: tuple[str, bytes], **more: Any) -> dict[str, Any]:
    """What the engine says of one branch; each byte is a token."""
    told = [(kind, list(text)) for kind, text in changes]
    return {"index": index, "changes": told, "logs": "", "storage": [], **more}


def step(*forks: dict[str, Any], **usage: int) -> dict[str, Any]:
    """What the engine says of one step."""
    return {"forks": list(forks), "usage": {**USAGE, **usage}}


HELLO = [
    [step(fork(0, ("spliced", b"Hello")), sampled_tokens=0)],
    [step(fork(0, ("sampled", b" you"), logs="GEN: ' you'\n"))],
    [step(fork(0, finish_reason="stop", error=None))],
]


@dataclass
class FakeFront:
    """An engine with a token for each byte. `outputs` are the lists of events of its outputs."""

    catalog: Catalog
    outputs: list[list[dict[str, Any]]] = field(default_factory=lambda: list(HELLO))
    results: dict[str, Any] | None = field(default_factory=lambda: {"branches": [], "usage": USAGE})
    failure: Exception | None = None
    endless: bool = False
    asked: list[tuple[Rendered, Any, Mapping[str, str]]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    context: int = 100
    live_key: str = "live"
    events_key: str = "events"
    results_key: str = "controller"

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    async def render(self, request: RunRequest, prompt: str) -> Rendered:
        text = prompt if request.messages is None else repr(request.messages)
        if request.model not in (None, "m"):
            raise bad_request(f"no model {request.model}")
        return Rendered({"prompt_token_ids": list(text.encode())}, len(text.encode()), "m")

    def admit(self, rendered: Rendered, params: Any) -> tuple[Rendered, Any]:
        if rendered.length >= self.context:
            raise bad_request("the prompt is too long")
        name = (params.extra_args or {}).get("controller", "greet")
        if "\n" in name:
            self.catalog.check(name.encode())
        else:
            try:
                source = self.catalog.source_of(name)
            except UnknownControllerError as error:
                raise bad_request(error.message) from None
            if source is not None:
                params = copy.copy(params)
                params.extra_args = {**params.extra_args, "controller": source}
        return replace(rendered), params

    async def generate(
        self, rendered: Rendered, params: Any, request_id: str, headers: Mapping[str, str]
    ) -> AsyncIterator[Any]:
        self.asked.append((rendered, params, headers))
        controlled = bool(params.extra_args)
        try:
            for at, events in enumerate(self.outputs):
                await asyncio.sleep(0)
                if controlled:
                    told = {self.events_key: events}
                    if at == len(self.outputs) - 1 and self.results is not None:
                        told[self.results_key] = self.results  # type: ignore[assignment]
                    yield SimpleNamespace(kv_transfer_params=told)
                else:
                    last = at == len(self.outputs) - 1
                    one = SimpleNamespace(text="x", token_ids=[7], finish_reason="stop" if last else None)
                    yield SimpleNamespace(outputs=[one])
            if self.failure is not None:
                raise self.failure
            while self.endless:
                await asyncio.sleep(3600)
        finally:
            self.left.set()


@dataclass
class Served:
    """A server in this process: a client of it, and what stands behind it."""

    app: FastAPI
    http: TestClient
    front: FakeFront
    store: Store

    def upload(self, source: str = SCRIPT, **more: Any) -> httpx.Response:
        """Upload a script."""
        headers = {"content-type": "text/x-python", **more.pop("headers", {})}
        return self.http.post("/v1/controllers", content=source, headers=headers, **more)

    def tag(self, module_id: str, *tags: str, **more: Any) -> httpx.Response:
        """Tag a script."""
        return self.http.post("/v1/controllers/tags", json={"module_id": module_id, "tags": tags}, **more)

    def run(self, controller: str = SCRIPT, **more: Any) -> httpx.Response:
        """Run a controller."""
        return self.http.post("/v1/run", json={"controller": controller, **more})


@contextmanager
def serving(folder: Path, keys: list[str] | None = None, **settings: Any) -> Iterator[Served]:
    """Our routes in vLLM's shell; `settings` are those of `ServerSettings`."""
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    routes.attach(app)
    init_exception_handler(app)
    if keys:
        app.add_middleware(AuthenticationMiddleware, tokens=keys)
    made = ServerSettings(store=folder, **settings)
    store = Store(made.store, made.store_bytes, made.tags, made.tags_of_user)
    catalog = Catalog(store, Limits(), lambda: INSTALLED)
    front = FakeFront(catalog)
    app.state.aici = routes.Service(made, catalog, front, bool(keys))
    with TestClient(app) as http:
        yield Served(app, http, front, store)
    store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "store") as running:
        yield running
