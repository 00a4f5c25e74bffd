"""Chat functions: how a model is called, and what a call reports about itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
ChatFn = Callable[..., str] | Callable[..., Awaitable[str]]
"""`(messages, model) -> str`, or `(messages) -> str`; for `arun` it may be a coroutine function."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one model call. `cached_tokens` is the part of `prompt_tokens` that needed no prefill."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.generated_tokens + other.generated_tokens,
        )


class Reply(str):
    """A chat function's answer that also says what it cost.

    It is a plain string to every caller; the call tree reads `usage` where there is one.
    """

    usage: Usage | None

    def __new__(cls, text: str, usage: Usage | None = None) -> Reply:
        reply = super().__new__(cls, text)
        reply.usage = usage
        return reply


def usage_of(answer: object) -> Usage | None:
    """The usage an answer carries, or None when the chat function reports none."""
    return getattr(answer, "usage", None)


def _model_style(function: Callable[..., Any]) -> str:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "positional"
    try:
        signature.bind(None, None)
    except TypeError:
        return "keyword" if "model" in signature.parameters else "none"
    return "positional"


def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of one or two arguments so that it can always be called with `(value, model)`.

    The signature decides, not a failed call: a `TypeError` raised inside the function is the
    function's own error and propagates after one call. A one-argument function never sees the model.
    Further keyword arguments are passed on as they are.
    """
    style = _model_style(function)

    def call(value: Any, model: str | None = None, **extra: Any) -> Any:
        if style == "positional":
            return function(value, model, **extra)
        if style == "keyword":
            return function(value, model=model, **extra)
        return function(value, **extra)

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives an awaitable, as far as its definition tells."""
    function = inspect.unwrap(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - the method itself is wanted, not callability
    )


async def settle(value: Any) -> Any:
    """The value itself, or what it resolves to when it is awaitable."""
    if inspect.isawaitable(value):
        return await value
    return value


async def call_off_loop(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` from a coroutine: awaited when it is a coroutine function, else in a thread."""
    if is_async(function):
        return await function(*args, **kwargs)
    return await settle(await asyncio.to_thread(function, *args, **kwargs))


def run_to_end(coroutine: Awaitable[Any]) -> Any:
    """Drive a coroutine that never has to wait, without an event loop.

    The synchronous API shares its code with the asynchronous one: where every function it was given is
    synchronous, nothing in that code suspends.

    Raises:
        TypeError: something inside did suspend, so a coroutine function was given to a synchronous call.
    """
    runner = coroutine.__await__()
    try:
        next(runner)
    except StopIteration as stop:
        return stop.value
    runner.close()
    raise TypeError("a coroutine function was given to a synchronous call; use arun, areset or astep instead")
