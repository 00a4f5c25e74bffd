"""Operations on conversations: read the end, split multi-sample replies, shorten, drop used arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aici_vllm.agents.messages import AIMessage, Conversation, Message, SystemMessage, UserMessage

if TYPE_CHECKING:
    from aici_vllm.agents.calls import AICall


def _messages_of(source: Sequence[Message] | AICall) -> Sequence[Message]:
    return source if isinstance(source, Sequence) else source.conversation


def last_message(source: Sequence[Message] | AICall) -> Message | None:
    """The last message of a conversation or of a call's conversation, None when it is empty."""
    messages = _messages_of(source)
    return messages[-1] if messages else None


def last_output(source: Sequence[Message] | AICall) -> Any:
    """The content of the last message, None when there is none."""
    message = last_message(source)
    return None if message is None else message.content


def remove_used_kwargs(kwargs: Mapping[str, Any], conversation: Sequence[Message]) -> dict[str, Any]:
    """`kwargs` without the names that some message of the conversation used as a placeholder."""
    used = {
        name
        for message in conversation
        if isinstance(message, SystemMessage | UserMessage)
        for name in message.variables
    }
    return {name: value for name, value in kwargs.items() if name not in used}


def split_multi_samples(conversation: Conversation) -> list[Conversation]:
    """One conversation per reply of the last request, each with the common past."""
    if not conversation:
        return [[]]
    last = conversation[-1]
    if len(conversation) == 1 or not isinstance(last, AIMessage) or last.sample_id is None:
        return [conversation]
    samples: Conversation = []
    past: Conversation = []
    for message in conversation:
        is_sample = isinstance(message, AIMessage) and message.run_id == last.run_id
        (samples if is_sample else past).append(message)
    return [[*past, sample] for sample in samples]


def content_length(message: Message) -> int:
    """Characters of a message's content; content that is not text counts as its printed form."""
    return len(message.content) if isinstance(message.content, str) else len(str(message.content))


def truncate_conversation(conversation: Conversation, max_conversation_length: int = 32000) -> Conversation:
    """The conversation cut to `max_conversation_length` characters by leaving out messages in the middle.

    The last two messages always stay. Of the others, from the beginning, each that still fits is kept. A
    conversation that fits, or has at most two messages, is returned as it is.
    """
    if max_conversation_length <= 0:
        raise ValueError(f"max_conversation_length must be positive, got {max_conversation_length}.")
    lengths = [content_length(message) for message in conversation]
    if sum(lengths) <= max_conversation_length or len(conversation) <= 2:
        return conversation
    remaining = max_conversation_length - sum(lengths[-2:])
    kept = []
    for message, length in zip(conversation[:-2], lengths[:-2], strict=True):
        if length <= remaining:
            kept.append(message)
            remaining -= length
    return [*kept, *conversation[-2:]]
