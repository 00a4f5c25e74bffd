"""The AI functions that lazy calls wrap: generate, extract, classify, scan, embed.

Each is called as `function(conversation, **kwargs)` or `function(schema, conversation, **kwargs)` and
returns the rendered prompt followed by the replies. The model is the schema, a callable given as `model=`,
or the default model. With an asynchronous model they return an awaitable of the same.
"""

from __future__ import annotations

import base64
import inspect
import mimetypes
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from aici_vllm.agents.errors import ModelCallError, NoModelError
from aici_vllm.agents.messages import (
    MESSAGE_TYPES,
    AIMessage,
    Conversation,
    DataMessage,
    Message,
    UserMessage,
    render,
)
from aici_vllm.agents.models.base import PromptSchema
from aici_vllm.agents.templates import AITemplate, template_messages

if TYPE_CHECKING:
    from pydantic import BaseModel

Model: TypeAlias = Callable[..., Any]
Prompt: TypeAlias = str | UserMessage | AITemplate | list[Message]
Choice: TypeAlias = str | tuple[str, str]

_default_model: Model | None = None


def set_default_model(model: Model | None) -> Model | None:
    """Set the model of calls that name none; returns the one set before. Holds for the whole process."""
    global _default_model
    if model is not None and not callable(model):
        raise TypeError(f"A model is a callable, got {type(model).__name__}.")
    previous, _default_model = _default_model, model
    return previous


def aigenerate(*prompt: Any, **kwargs: Any) -> Any:
    """Ask the model for text. kwargs fill placeholders; `api_kwargs` are the sampling parameters."""
    model, conversation, kwargs = _unpack(prompt, kwargs)
    return model(_rendered(conversation, kwargs), **kwargs)


def aiextract(*prompt: Any, return_type: type[BaseModel], **kwargs: Any) -> Any:
    """Ask for an instance of the pydantic model `return_type`; replies become data messages.

    The model is asked for JSON of that schema through `api_kwargs["response_format"]` unless it is set.
    Raises ModelCallError for a reply that does not validate.
    """
    _check_return_type(return_type)
    model, conversation, kwargs = _unpack(prompt, kwargs)
    schema = {"name": return_type.__name__, "schema": return_type.model_json_schema()}
    json_format = {"type": "json_schema", "json_schema": schema}
    kwargs["api_kwargs"] = {"response_format": json_format, **(kwargs.get("api_kwargs") or {})}
    result = model(_rendered(conversation, kwargs), **kwargs)
    return _then(result, lambda reply: _map_replies(reply, lambda message: _extracted(message, return_type)))


def aiclassify(*prompt: Any, choices: Sequence[Choice], **kwargs: Any) -> Any:
    """Ask the model to pick one of `choices` (labels, or pairs of label and description).

    The reply's content becomes the label; a reply that names none of them stays as it is, for a condition to
    refuse. Temperature is 0 unless `api_kwargs` says otherwise.
    """
    labelled = [choice if isinstance(choice, tuple) else (choice, "") for choice in choices]
    if not labelled:
        raise ValueError("aiclassify needs at least one choice.")
    model, conversation, kwargs = _unpack(prompt, kwargs)
    kwargs["api_kwargs"] = {"temperature": 0, **(kwargs.get("api_kwargs") or {})}
    asked = _with_instruction(_rendered(conversation, kwargs), _choice_instruction(labelled))
    labels = [label for label, _ in labelled]
    return _then(
        model(asked, **kwargs),
        lambda reply: _map_replies(reply, lambda message: _classified(message, labels)),
    )


def aiscan(
    *prompt: Any,
    image_url: str | Sequence[str] = (),
    image_path: str | Path | Sequence[str | Path] = (),
    **kwargs: Any,
) -> Any:
    """Ask about images, given by URL or by path (sent as data URLs); they go with the last user message."""
    urls = [image_url] if isinstance(image_url, str) else list(image_url)
    paths = [image_path] if isinstance(image_path, str | Path) else list(image_path)
    images = (*urls, *(_data_url(Path(path)) for path in paths))
    model, conversation, kwargs = _unpack(prompt, kwargs)
    return model(_with_images(_rendered(conversation, kwargs), images), **kwargs)


def aiembed(*prompt: Any, **kwargs: Any) -> Any:
    """The embedding of the last user message, as a data message; the model must have `embed(texts)`."""
    model, conversation, kwargs = _unpack(prompt, kwargs)
    embed = getattr(model, "embed", None)
    if embed is None:
        raise TypeError(
            f"{type(model).__name__} cannot embed: aiembed needs a model with an embed(texts) method."
        )
    asked = render(conversation, kwargs, no_system_message=True)
    index = _last_user_index(asked)
    return _then(embed([asked[index].content], **kwargs), lambda vectors: [*asked, DataMessage(vectors[0])])


def prompt_messages(prompt: Prompt) -> Conversation:
    """A prompt as messages: a string or user message alone, a template's messages, a list by reference."""
    if isinstance(prompt, str):
        return [UserMessage(prompt)]
    if isinstance(prompt, UserMessage):
        return [prompt]
    if isinstance(prompt, AITemplate):
        return template_messages(prompt)
    if isinstance(prompt, list) and all(isinstance(message, MESSAGE_TYPES) for message in prompt):
        return prompt
    raise TypeError(
        f"Invalid argument type: {type(prompt).__name__}; a prompt is a string, a template or messages."
    )


def _unpack(prompt: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Model, Conversation, dict[str, Any]]:
    """The model, the conversation and the remaining arguments of an AI function's call."""
    rest = {name: value for name, value in kwargs.items() if name != "return_all"}
    schema = prompt[0] if prompt and isinstance(prompt[0], PromptSchema) else None
    prompts = prompt[1:] if schema is not None else prompt
    if len(prompts) != 1:
        raise TypeError(
            f"An AI function takes an optional schema and one prompt, got {len(prompts)} prompts."
        )
    model = rest.pop("model") if callable(rest.get("model")) else schema or _default_model
    if model is None:
        raise NoModelError(
            "No model: pass model= (a callable), a schema first, or call set_default_model(...)."
        )
    return model, prompt_messages(prompts[0]), rest


def _rendered(conversation: Conversation, kwargs: Mapping[str, Any]) -> Conversation:
    return render(conversation, kwargs, no_system_message=bool(kwargs.get("no_system_message", False)))


def _then(result: Any, finish: Callable[[Any], Conversation]) -> Any:
    """Apply `finish` to a result, when it is there for an awaitable one."""
    return _await_then(result, finish) if inspect.isawaitable(result) else finish(result)


async def _await_then(result: Awaitable[Any], finish: Callable[[Any], Conversation]) -> Conversation:
    return finish(await result)


def _map_replies(conversation: Conversation, change: Callable[[AIMessage], Message]) -> Conversation:
    """Change the replies of the last request (those of its run, or the last message alone)."""
    last = conversation[-1] if conversation else None
    if not isinstance(last, AIMessage):
        raise ModelCallError("The model returned no reply: the conversation does not end with an AIMessage.")
    run = last.run_id if last.sample_id is not None else None

    def is_reply(message: Message) -> bool:
        return message is last or (
            run is not None and isinstance(message, AIMessage) and message.run_id == run
        )

    return [change(message) if is_reply(message) else message for message in conversation]  # type: ignore[arg-type]


def _check_return_type(return_type: Any) -> None:
    from pydantic import BaseModel

    if not (isinstance(return_type, type) and issubclass(return_type, BaseModel)):
        raise TypeError(f"return_type must be a pydantic model class, got {return_type!r}.")


def _extracted(message: AIMessage, return_type: type[BaseModel]) -> DataMessage:
    from pydantic import ValidationError

    text = message.content.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3].strip()
    try:
        value = return_type.model_validate_json(text)
    except ValidationError as error:
        raise ModelCallError(
            f"The reply is not a valid {return_type.__name__}: {error}", body=message.content
        ) from error
    kept = {entry.name: getattr(message, entry.name) for entry in fields(DataMessage)}
    return DataMessage(**{**kept, "content": value})


def _choice_instruction(labelled: Sequence[tuple[str, str]]) -> str:
    lines = [
        f"{number}. {label}" + (f" ({description})" if description else "")
        for number, (label, description) in enumerate(labelled, start=1)
    ]
    return "Pick the one choice that fits best and answer with its number only.\n" + "\n".join(lines)


def _classified(message: AIMessage, labels: Sequence[str]) -> AIMessage:
    answer = message.content.strip().rstrip(".")
    if answer.isdecimal() and 1 <= int(answer) <= len(labels):
        return replace(message, content=labels[int(answer) - 1])
    same = [label for label in labels if label.casefold() == answer.casefold()]
    return replace(message, content=same[0]) if same else message


def _last_user_index(conversation: Conversation) -> int:
    for index in range(len(conversation) - 1, -1, -1):
        if isinstance(conversation[index], UserMessage):
            return index
    raise ValueError("The conversation has no user message to work on.")


def _with_instruction(conversation: Conversation, instruction: str) -> Conversation:
    """The conversation with `instruction` on its last user message, unless a message already holds it."""
    if any(isinstance(message, UserMessage) and instruction in message.content for message in conversation):
        return conversation
    index = _last_user_index(conversation)
    message = conversation[index]
    asked = replace(message, content=f"{message.content}\n\n{instruction}")
    return [*conversation[:index], asked, *conversation[index + 1 :]]


def _with_images(conversation: Conversation, images: tuple[str, ...]) -> Conversation:
    """The conversation with `images` on its last user message, unless an earlier call attached them."""
    present = {
        image for message in conversation if isinstance(message, UserMessage) for image in message.images
    }
    missing = tuple(image for image in images if image not in present)
    if not missing:
        return conversation
    index = _last_user_index(conversation)
    message = conversation[index]
    assert isinstance(message, UserMessage)
    seen = replace(message, images=message.images + missing)
    return [*conversation[:index], seen, *conversation[index + 1 :]]


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
