"""What every shipped model shares: how it is called, and how replies become messages."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aici_vllm.agents.messages import (
    AIMessage,
    Conversation,
    Message,
    SystemMessage,
    TokenSequence,
    UserMessage,
    render,
)


class PromptSchema(ABC):
    """A model, or a way to reach one: `schema(conversation, **kwargs)` returns prompt and replies.

    An instance may stand first among the arguments of an AI function or a lazy call
    (`AIGenerate(schema, "...")`), come as `model=schema`, or be the function of an `AICall` itself. Calls of
    an asynchronous model return an awaitable; `run_async` awaits it.
    """

    @abstractmethod
    def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Any:
        """The rendered prompt followed by the replies, as a new list (or an awaitable of it)."""


@dataclass(frozen=True)
class Reply:
    """One reply as a model gave it, before it is a message."""

    content: str
    log_prob: float | None = None
    finish_reason: str | None = None
    tokens: tuple[int, int] | None = None
    sequence: TokenSequence | None = None


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked: the rendered prompt, sampling parameters, the model's name if overridden.

    `http_kwargs` are for models behind HTTP: `timeout` in seconds and extra `headers`.
    """

    prompt: Conversation
    api_kwargs: dict[str, Any]
    model: str | None
    http_kwargs: dict[str, Any]

    @property
    def n(self) -> int:
        """How many replies are asked for."""
        return int(self.api_kwargs.get("n") or 1)


def prepare_request(conversation: Sequence[Message], kwargs: Mapping[str, Any]) -> ChatRequest:
    """Render the conversation with `kwargs` and sort out the arguments models understand."""
    prompt = render(conversation, kwargs, no_system_message=bool(kwargs.get("no_system_message", False)))
    model = kwargs.get("model")
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model must be the name of a model here, got {type(model).__name__}.")
    return ChatRequest(
        prompt, dict(kwargs.get("api_kwargs") or {}), model, dict(kwargs.get("http_kwargs") or {})
    )


def attach_replies(
    prompt: Sequence[Message], replies: Sequence[Reply], rng: random.Random | None = None
) -> Conversation:
    """The prompt followed by the replies of one request.

    They share a random `run_id`; several are numbered by `sample_id` from 1 and, where all have a `log_prob`,
    sorted so that the most likely comes last.
    """
    run_id = (rng or random).getrandbits(31)
    several = len(replies) > 1
    messages = [
        AIMessage(
            reply.content,
            run_id,
            index if several else None,
            reply.log_prob,
            reply.finish_reason,
            reply.tokens,
            reply.sequence,
        )
        for index, reply in enumerate(replies, start=1)
    ]
    if several and all(message.log_prob is not None for message in messages):
        messages.sort(key=lambda message: message.log_prob or 0.0)
    return [*prompt, *messages]


def chat_dicts(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """The prompt as the role/content dictionaries of the chat completions format."""
    return [{"role": _role(message), "content": _content(message)} for message in prompt]


def _role(message: Message) -> str:
    if isinstance(message, SystemMessage):
        return "system"
    return "user" if isinstance(message, UserMessage) else "assistant"


def _content(message: Message) -> Any:
    if not isinstance(message, UserMessage) or not message.images:
        return message.content
    text = {"type": "text", "text": message.content}
    return [text, *({"type": "image_url", "image_url": {"url": url}} for url in message.images)]
