"""A model that answers from a script: for tests, examples and dry runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aici_vllm.agents.errors import ScriptExhausted
from aici_vllm.agents.messages import Conversation, Message
from aici_vllm.agents.models.base import PromptSchema, Reply, attach_replies, prepare_request


@dataclass(frozen=True)
class ScriptedCall:
    """One request a scripted model received: the rendered prompt and the arguments."""

    prompt: Conversation
    kwargs: dict[str, Any]


class ScriptedModel(PromptSchema):
    """Gives prepared replies in order, `api_kwargs["n"]` of them per request.

    `script` is an iterable of strings, `Reply` objects and exceptions (an exception is raised instead of a
    reply, and uses up its place), or a function from the rendered prompt to one reply. `calls` records every
    request. Raises ScriptExhausted when the script has run out. Embeddings come from `embedding`, a function
    from a text to a vector.
    """

    def __init__(
        self,
        script: Iterable[str | Reply | BaseException] | Callable[[Conversation], str | Reply],
        *,
        embedding: Callable[[str], list[float]] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._answer = script if callable(script) else None
        self._script = None if callable(script) else iter(script)
        self._embedding = embedding
        self._rng = rng
        self.calls: list[ScriptedCall] = []

    def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        request = prepare_request(conversation, kwargs)
        self.calls.append(ScriptedCall(request.prompt, kwargs))
        replies = [self._next_reply(request.prompt) for _ in range(request.n)]
        return attach_replies(request.prompt, replies, self._rng)

    def embed(self, texts: Sequence[str], **kwargs: Any) -> list[list[float]]:
        """One vector per text. Raises ScriptExhausted when no embedding function was given."""
        if self._embedding is None:
            raise ScriptExhausted("This scripted model has no embedding function; pass embedding=.")
        return [self._embedding(text) for text in texts]

    def _next_reply(self, prompt: Conversation) -> Reply:
        if self._answer is not None:
            entry: str | Reply | BaseException = self._answer(prompt)
        else:
            assert self._script is not None
            entry = next(
                self._script, ScriptExhausted(f"The script has no reply for request {len(self.calls)}.")
            )
        if isinstance(entry, BaseException):
            raise entry
        return entry if isinstance(entry, Reply) else Reply(entry)
