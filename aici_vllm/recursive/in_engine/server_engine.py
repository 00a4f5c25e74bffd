"""An engine behind an OpenAI-compatible server that was started with this plugin (`aici serve`)."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from .engine import EngineAnswer, EngineCall, answer_of
from .errors import EngineCallError
from .frame import ChatFrame, Message, read_frame
from .program import NAME

OPEN_REQUESTS = 512
"""Requests on the wire at a time: more than an engine runs at once, fewer than a process may open files."""


class ServerEngine:
    """The completions of the server at `base_url` (such as `http://localhost:8000/v1`).

    Calls beyond `open_requests` wait in this process. A call that is cancelled closes its connection, and
    the server aborts it. `aclose` closes the connections; an engine is used in one event loop.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        open_requests: int = OPEN_REQUESTS,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.context = 0
        self.model = model
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._open_requests = open_requests
        self._template = chat_template_kwargs
        self._http: httpx.AsyncClient | None = None
        self._gate = asyncio.Semaphore(open_requests)
        self._frame: asyncio.Task[ChatFrame] | None = None
        self._heads: dict[str, tuple[int, ...]] = {}

    async def frame(self) -> ChatFrame:
        if self._frame is None:
            self._frame = asyncio.create_task(read_frame(self._render))
        return await asyncio.shield(self._frame)

    async def token_ids(self, text: str) -> tuple[int, ...]:
        if text not in self._heads:
            body = {"prompt": text, "add_special_tokens": False}
            self._heads[text] = tuple((await self._post("/tokenize", body))["tokens"])
        return self._heads[text]

    async def send(self, call: EngineCall) -> EngineAnswer:
        from aici_vllm.offline import ControllerResult

        body = {
            # The server takes no empty list, and makes no tokens of an empty text.
            "prompt": list(call.prompt) or "",
            "max_tokens": self.context - max(1, len(call.prompt)),
            **dict(call.sampling),
            "vllm_xargs": _extra_args(call),
        }
        async with self._gate:
            answer = await self._post("/v1/completions", body, call.model)
        found = (answer.get("kv_transfer_params") or {}).get("controller")
        if found is None:
            raise EngineCallError(
                "the server ran the request without a controller: start it with `aici serve`"
            )
        return answer_of(ControllerResult.from_json(found))

    async def aclose(self) -> None:
        """Close the connections."""
        http, self._http, self._frame = self._http, None, None
        if http is not None:
            await http.aclose()

    async def _render(self, messages: list[Message]) -> str:
        body = {"messages": messages, "chat_template_kwargs": self._template}
        tokens = await self._post("/tokenize", body)
        self.context = int(tokens["max_model_len"])
        text: str = (await self._post("/detokenize", {"tokens": tokens["tokens"]}))["prompt"]
        return text

    async def _post(self, path: str, body: dict[str, Any], model: str | None = None) -> dict[str, Any]:
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._open_requests)
            self._http = httpx.AsyncClient(timeout=self._timeout_s, headers=self._headers, limits=limits)
        url = self._base_url.removesuffix("/v1") + path
        response = await self._http.post(url, json={"model": model or self.model, **body})
        if response.status_code != 200:
            raise EngineCallError(f"{url} answered {response.status_code}: {response.text[:500]}")
        found: dict[str, Any] = response.json()
        return found


def _extra_args(call: EngineCall) -> dict[str, str]:
    given = {
        "controller": NAME,
        "controller_arg": call.plan.as_json(),
        "controller_checkpoint": call.checkpoint,
        "controller_from": call.from_checkpoint,
        "controller_drop": call.drop,
    }
    return {name: value for name, value in given.items() if value is not None}
