"""Models behind an OpenAI-compatible server: chat completions and embeddings over HTTP, sync and async."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aici_vllm.agents.errors import ModelCallError
from aici_vllm.agents.messages import Conversation, Message
from aici_vllm.agents.models.base import (
    ChatRequest,
    PromptSchema,
    Reply,
    attach_replies,
    chat_dicts,
    prepare_request,
)

if TYPE_CHECKING:
    import httpx

DEFAULT_BASE_URL = "https://api.openai.com/v1"
BODY_EXCERPT = 500


class _OpenAIEndpoint(PromptSchema):
    """What the two clients share: where the server is, what is sent, and how the answer is read.

    model: the model's name as the server knows it; a `model="name"` of a call overrides it.
    base_url: up to and including `/v1` (added when the URL has no path); default $OPENAI_BASE_URL.
    api_key: sent as bearer token when set; default $OPENAI_API_KEY.
    timeout: seconds for a whole request without progress; a call's `http_kwargs={"timeout": ...}` overrides
        it.
    headers: added to every request.
    rng: source of the random run ids.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        headers: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.model = model
        self.base_url = _api_root(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL)
        self.timeout = timeout
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        self._headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        self._rng = rng

    def _chat_payload(self, request: ChatRequest) -> dict[str, Any]:
        return {
            "model": request.model or self.model,
            "messages": chat_dicts(request.prompt),
            **request.api_kwargs,
            "stream": False,
        }

    def _embedding_payload(self, texts: Sequence[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        chosen = kwargs.get("model")
        return {"model": chosen or self.model, "input": list(texts)}

    def _post_arguments(
        self, path: str, payload: dict[str, Any], http_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "url": f"{self.base_url}/{path}",
            "json": payload,
            "headers": {**self._headers, **(http_kwargs.get("headers") or {})},
            "timeout": http_kwargs.get("timeout", self.timeout),
        }

    def _conversation(self, request: ChatRequest, answer: Mapping[str, Any]) -> Conversation:
        try:
            replies = [_reply(choice, answer.get("usage")) for choice in answer["choices"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelCallError(
                f"{self.base_url} did not answer with chat completions: {error!r}."
            ) from error
        if not replies:
            raise ModelCallError(f"{self.base_url} answered with no choices.")
        return attach_replies(request.prompt, replies, self._rng)

    def _vectors(self, answer: Mapping[str, Any]) -> list[list[float]]:
        try:
            entries = sorted(answer["data"], key=lambda entry: entry["index"])
            return [list(entry["embedding"]) for entry in entries]
        except (KeyError, TypeError) as error:
            raise ModelCallError(f"{self.base_url} did not answer with embeddings: {error!r}.") from error


class OpenAIModel(_OpenAIEndpoint):
    """A model behind any server with `/v1/chat/completions`, called and waited for."""

    _client: httpx.Client | None = None

    def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        """The prompt and the replies. Raises ModelCallError when the server cannot be reached or refuses."""
        request = prepare_request(conversation, kwargs)
        answer = self._post("chat/completions", self._chat_payload(request), request.http_kwargs)
        return self._conversation(request, answer)

    def embed(self, texts: Sequence[str], **kwargs: Any) -> list[list[float]]:
        """One vector per text, from `/v1/embeddings`."""
        return self._vectors(
            self._post("embeddings", self._embedding_payload(texts, kwargs), kwargs.get("http_kwargs") or {})
        )

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _post(self, path: str, payload: dict[str, Any], http_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        if self._client is None:
            self._client = httpx.Client()
        try:
            response = self._client.post(**self._post_arguments(path, payload, http_kwargs))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from error
        return _checked_answer(self.base_url, response)


class AsyncOpenAIModel(_OpenAIEndpoint):
    """The asynchronous client: calls return awaitables, and cancelling one closes its connection."""

    _client: httpx.AsyncClient | None = None

    async def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        """The prompt and the replies. Raises ModelCallError when the server cannot be reached or refuses."""
        request = prepare_request(conversation, kwargs)
        answer = await self._post("chat/completions", self._chat_payload(request), request.http_kwargs)
        return self._conversation(request, answer)

    async def embed(self, texts: Sequence[str], **kwargs: Any) -> list[list[float]]:
        """One vector per text, from `/v1/embeddings`."""
        payload = self._embedding_payload(texts, kwargs)
        return self._vectors(await self._post("embeddings", payload, kwargs.get("http_kwargs") or {}))

    async def close(self) -> None:
        """Close the connections; use it before the event loop ends, or before another loop uses the model."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(
        self, path: str, payload: dict[str, Any], http_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient()
        try:
            response = await self._client.post(**self._post_arguments(path, payload, http_kwargs))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from error
        return _checked_answer(self.base_url, response)


def _api_root(base_url: str) -> str:
    """The URL without a trailing slash, with `/v1` when it names only a host."""
    trimmed = base_url.rstrip("/")
    return trimmed if urlsplit(trimmed).path else f"{trimmed}/v1"


def _unreachable(base_url: str, error: httpx.HTTPError) -> ModelCallError:
    return ModelCallError(f"No answer from {base_url}: {type(error).__name__}: {error}.")


def _checked_answer(base_url: str, response: httpx.Response) -> dict[str, Any]:
    body = response.text[:BODY_EXCERPT]
    if response.is_error:
        raise ModelCallError(
            f"{base_url} answered with HTTP {response.status_code}: {body}", response.status_code, body
        )
    try:
        answer = response.json()
    except ValueError as error:
        raise ModelCallError(
            f"{base_url} did not answer with JSON: {body}", response.status_code, body
        ) from error
    if not isinstance(answer, dict):
        raise ModelCallError(
            f"{base_url} did not answer with a JSON object: {body}", response.status_code, body
        )
    return answer


def _reply(choice: Mapping[str, Any], usage: Mapping[str, Any] | None) -> Reply:
    """One choice as a reply; the tokens are those of the whole request, as the server counts them."""
    logprobs = (choice.get("logprobs") or {}).get("content")
    tokens = (
        (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)) if usage else None
    )
    return Reply(
        content=choice["message"].get("content") or "",
        log_prob=sum(token["logprob"] for token in logprobs) if logprobs else None,
        finish_reason=choice.get("finish_reason"),
        tokens=tokens,
    )
