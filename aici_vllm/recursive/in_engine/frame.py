"""The frame of a chat: the text that a model's template puts around messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from .errors import EngineCallError

Message = dict[str, str]
Piece = tuple[str, bool]
"""Text, and whether it is data: in data no special token is recognised."""

SAME_ROLE = "\n\n"
"""Between two messages of one role, which are written as one: many templates know no other way."""

SYSTEM, USER, ASSISTANT, SECOND = "Sentinelsystem", "Sentineluser", "Sentinelassistant", "Sentinelsecond"


@dataclass(frozen=True)
class ChatFrame:
    """What stands between two messages, by their roles; "" is the start.

    A conversation is written piece by piece and never by the template again: templates may change earlier
    turns once others follow, and the tokens of a reply are those that were sampled.
    """

    between: dict[tuple[str, str], str]

    def head(self, messages: Sequence[Message]) -> str:
        """What stands before the first message."""
        return self._between("", messages[0]["role"])

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole conversation behind its head, ready for a reply."""
        return self._joined("", messages)[1:]

    def continuation(self, seen: Sequence[Message], messages: Sequence[Message]) -> list[Piece] | None:
        """What follows `seen`, whose last message is a reply of the model; None if `messages` goes not on.

        The reply may have been added to.
        """
        if not seen or len(messages) <= len(seen) or list(messages[: len(seen) - 1]) != list(seen[:-1]):
            return None
        reply, kept = seen[-1], messages[len(seen) - 1]
        if kept["role"] != reply["role"] or not kept["content"].startswith(reply["content"]):
            return None
        added = kept["content"][len(reply["content"]) :]
        rest = self._joined(reply["role"], messages[len(seen) :])
        return [(added, True), *rest] if added else rest

    def _joined(self, role: str, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            pieces.append((self._between(role, message["role"]), False))
            # Tokens are made from UTF-8, which has no halves of surrogate pairs.
            pieces.append((message["content"].encode("utf-8", "replace").decode(), True))
            role = message["role"]
        return [*pieces, (self._between(role, "assistant"), False)]

    def _between(self, first: str, second: str) -> str:
        if first == second:
            return SAME_ROLE
        try:
            return self.between[first, second]
        except KeyError:
            raise EngineCallError(
                f"a conversation with {second!r} after {first or 'the start'!r} cannot be written: send a "
                "system message at most, then user and assistant messages in turn"
            ) from None


async def read_frame(render: Callable[[list[Message]], Awaitable[str]]) -> ChatFrame:
    """The frame of the template behind `render`, which writes messages as text, ready for a reply.

    Raises:
        EngineCallError: the template does not show every message once, or has nothing before the first.
    """
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}
    assistant, second = {"role": "assistant", "content": ASSISTANT}, {"role": "user", "content": SECOND}
    head, reply = _around([USER], await render([user]))
    *_, to_second, _ = _around([USER, ASSISTANT, SECOND], await render([user, assistant, second]))
    between = {("", "user"): head, ("user", "assistant"): reply, ("assistant", "user"): to_second}
    system_head, to_user, _ = _around([SYSTEM, USER], await render([system, user]))
    between |= {("", "system"): system_head, ("system", "user"): to_user}
    if not (head and system_head):
        raise EngineCallError("the chat template writes nothing before the first message; use openai_chat")
    return ChatFrame(between)


def _around(sentinels: list[str], text: str) -> list[str]:
    """`text` split at the sentinels."""
    parts = []
    for sentinel in sentinels:
        before, found, text = text.partition(sentinel)
        if not found or sentinel in text:
            raise EngineCallError("the chat template does not write every message once; use openai_chat")
        parts.append(before)
    return [*parts, text]
