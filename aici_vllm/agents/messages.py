"""Messages, conversations, and how a prompt is rendered before a model sees it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from aici_vllm.agents.branches.kept import Kept

logger = logging.getLogger("aici_vllm.agents")

DEFAULT_SYSTEM_PROMPT = "Act as a helpful AI assistant"

RESERVED_VARIABLES = frozenset(
    {
        "api_kwargs",
        "http_kwargs",
        "conversation",
        "return_all",
        "dry_run",
        "model",
        "image_url",
        "image_path",
        "image_detail",
        "strict",
        "json_mode",
        "no_system_message",
        "aiprefill",
        "name_user",
        "name_assistant",
        "betas",
    }
)

_PLACEHOLDER = re.compile(r"\{\{([^\}]+)\}\}")


def find_variables(content: str) -> list[str]:
    """Names of the `{{name}}` placeholders of `content`, in order, duplicates kept."""
    return _PLACEHOLDER.findall(content)


def _checked_variables(content: str, variables: list[str] | None) -> list[str]:
    """The given variables, or those found in `content`; reserved names are refused."""
    if not isinstance(content, str):
        raise TypeError(f"Message content must be a string, got {type(content).__name__}.")
    if variables is not None:
        return variables
    found = find_variables(content)
    reserved = sorted(RESERVED_VARIABLES.intersection(found))
    if reserved:
        raise ValueError(
            f"Placeholder names {reserved} are reserved for model arguments; rename the placeholders."
        )
    return found


@dataclass(frozen=True)
class SystemMessage:
    """Instructions before the conversation. `variables` defaults to the placeholders of `content`."""

    content: str
    variables: list[str] = field(default=None, hash=False, repr=False)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        object.__setattr__(self, "variables", _checked_variables(self.content, self.variables))


@dataclass(frozen=True)
class UserMessage:
    """What the user says. `variables` stay after rendering; `images` are URLs sent with the text."""

    content: str
    variables: list[str] = field(default=None, hash=False, repr=False)  # type: ignore[arg-type]
    images: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variables", _checked_variables(self.content, self.variables))


@dataclass(frozen=True)
class TokenSequence:
    """The tokens an engine had when it finished a reply: a conversation can go on from exactly these.

    `prompt_text` and `reply_text` are what the prompt's and the reply's tokens stand for; the end-of-sequence
    token is not among `reply_ids`. `tokenizer` names what gave the numbers their meaning. `kept` is the
    sequence in the engine itself, which a pickle leaves behind.
    """

    prompt_text: str
    prompt_ids: tuple[int, ...]
    reply_text: str
    reply_ids: tuple[int, ...]
    tokenizer: str = ""
    kept: Kept | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenSequence:
        # Immutable, and trees are copied often.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenSequence, (
            self.prompt_text,
            self.prompt_ids,
            self.reply_text,
            self.reply_ids,
            self.tokenizer,
        )


@dataclass(frozen=True)
class AIMessage:
    """One reply of a model.

    Replies of one request share `run_id`; `sample_id` counts them from 1 and is None when the reply is the
    only one. `log_prob` is the sum of the reply's token log-probabilities where the server gave them;
    `tokens` is (prompt tokens, completion tokens). `sequence` holds the engine's tokens of a reply that was
    sampled in a branch. `run_id` and `sequence` do not take part in equality.
    """

    content: str
    run_id: int | None = field(default=None, compare=False)
    sample_id: int | None = None
    log_prob: float | None = None
    finish_reason: str | None = None
    tokens: tuple[int, int] | None = None
    sequence: TokenSequence | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class DataMessage:
    """A reply that is not text: a pydantic instance from `aiextract`, a vector from `aiembed`."""

    content: Any
    run_id: int | None = field(default=None, compare=False)
    sample_id: int | None = None
    log_prob: float | None = None
    finish_reason: str | None = None
    tokens: tuple[int, int] | None = None


Message: TypeAlias = SystemMessage | UserMessage | AIMessage | DataMessage
Conversation: TypeAlias = list[Message]

MESSAGE_TYPES = (SystemMessage, UserMessage, AIMessage, DataMessage)


def fill_placeholders(content: str, names: Sequence[str], values: Mapping[str, Any]) -> str:
    """Replace `{{name}}` for every name in `names` that has a value, in one pass; other placeholders stay."""
    known = {name: str(values[name]) for name in names if name in values}
    if not known:
        return content
    return _PLACEHOLDER.sub(lambda found: known.get(found.group(1), found.group(0)), content)


def fill_message(message: Message, values: Mapping[str, Any]) -> Message:
    """The message with its placeholders filled; AI and data messages come back as they are."""
    if not isinstance(message, SystemMessage | UserMessage):
        return message
    content = fill_placeholders(message.content, message.variables, values)
    return message if content == message.content else replace(message, content=content)


def render(
    conversation: Sequence[Message],
    values: Mapping[str, Any] | None = None,
    *,
    no_system_message: bool = False,
) -> Conversation:
    """The prompt a model receives: placeholders filled, one system message in front, data messages dropped.

    A missing system message is replaced by `DEFAULT_SYSTEM_PROMPT` unless `no_system_message`. Raises
    ValueError for more than one system message.
    """
    filled = [fill_message(message, values or {}) for message in conversation]
    system: Conversation = [message for message in filled if isinstance(message, SystemMessage)]
    if len(system) > 1:
        raise ValueError(
            f"A conversation may hold one system message, this one has {len(system)}; merge them."
        )
    if any(isinstance(message, DataMessage) for message in filled):
        logger.warning("Data messages cannot be shown to a model and were left out of the prompt.")
    if not system and not no_system_message:
        system = [SystemMessage(DEFAULT_SYSTEM_PROMPT)]
    return system + [message for message in filled if not isinstance(message, SystemMessage | DataMessage)]
