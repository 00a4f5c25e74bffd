"""Chat functions over any OpenAI-compatible server, synchronous and asynchronous, with token counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from .chat import Message, Reply, Usage


class ChatServerError(RuntimeError):
    """The server refused a chat request or answered something else than a chat completion."""


def openai_chat(
    base_url: str, model: str, *, api_key: str | None = None, timeout_s: float = 300.0, **sampling: Any
) -> Callable[..., Reply]:
    """A chat function that calls `base_url` (such as `http://localhost:8000/v1`).

    `model` is used where a call names no other. `sampling` goes into every request as it is (`temperature`,
    `max_tokens`, ...). Answers carry the token counts that the server reports.
    """
    client = httpx.Client(timeout=timeout_s, headers=_headers(api_key), limits=_NO_LIMIT)

    def chat(messages: list[Message], model_override: str | None = None) -> Reply:
        body = {"model": model_override or model, "messages": messages, **sampling}
        return _reply(client.post(_url(base_url), json=body))

    return chat


def async_openai_chat(
    base_url: str, model: str, *, api_key: str | None = None, timeout_s: float = 300.0, **sampling: Any
) -> Callable[..., Awaitable[Reply]]:
    """`openai_chat` as a coroutine function, for `LocalRLMRunner.arun`."""
    client = httpx.AsyncClient(timeout=timeout_s, headers=_headers(api_key), limits=_NO_LIMIT)

    async def chat(messages: list[Message], model_override: str | None = None) -> Reply:
        body = {"model": model_override or model, "messages": messages, **sampling}
        return _reply(await client.post(_url(base_url), json=body))

    return chat


_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def _url(base_url: str) -> str:
    return base_url.rstrip("/") + "/chat/completions"


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _reply(response: httpx.Response) -> Reply:
    if response.status_code != 200:
        raise ChatServerError(
            f"{response.request.url} answered {response.status_code}: {response.text[:500]}; "
            "check the address, the model name and the length of the prompt"
        )
    try:
        body = response.json()
        text = body["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError) as error:
        url = response.request.url
        raise ChatServerError(f"{url} did not answer with a chat completion: {error!r}") from error
    return Reply(text, _usage(body.get("usage")))


def _usage(reported: dict[str, Any] | None) -> Usage | None:
    if not reported:
        return None
    details = reported.get("prompt_tokens_details") or {}
    return Usage(
        reported.get("prompt_tokens") or 0,
        details.get("cached_tokens") or 0,
        reported.get("completion_tokens") or 0,
    )
