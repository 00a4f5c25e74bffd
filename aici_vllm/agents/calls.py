"""Lazy calls: an AI function with its arguments, run when asked, its samples kept in a tree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, TypeVar

from aici_vllm.agents.config import RetryConfig
from aici_vllm.agents.functions import aiclassify, aiembed, aiextract, aigenerate, aiscan, prompt_messages
from aici_vllm.agents.messages import MESSAGE_TYPES, AIMessage, Conversation, UserMessage
from aici_vllm.agents.models.base import PromptSchema
from aici_vllm.agents.rounds import Sampler, SequentialSampler, collecting
from aici_vllm.agents.samples import SampleNode, find_node
from aici_vllm.agents.templates import AITemplate

PREVIEW_HEADING = "- Preview of the Latest AIMessage (see property `:conversation`):"
PREVIEW_LENGTH = 100
COMPARED_FIELDS = (
    *("func", "schema", "conversation", "kwargs", "success", "error"),
    *("samples", "active_sample_id", "memory", "config"),
)


def unwrap_aicall_args(args: tuple[Any, ...]) -> tuple[PromptSchema | None, Conversation]:
    """The schema (or None) and the conversation among the positional arguments of a lazy call.

    A list of messages is used by reference, a string becomes one user message, an `AITemplate` its messages.
    Raises ValueError for more than two arguments, TypeError for anything else or a second prompt.
    """
    if len(args) > 2:
        raise ValueError(
            f"A lazy call takes at most a schema and a prompt, got {len(args)} positional arguments."
        )
    schema: PromptSchema | None = None
    conversation: Conversation = []
    for arg in args:
        if isinstance(arg, PromptSchema) and schema is None:
            schema = arg
        elif _is_conversation(arg) and not conversation:
            conversation = arg
        elif isinstance(arg, str | AITemplate) and not conversation:
            conversation = prompt_messages(arg)
        else:
            raise TypeError(f"Invalid argument type: {type(arg).__name__}")
    return schema, conversation


def _is_conversation(arg: Any) -> bool:
    return isinstance(arg, list) and all(isinstance(message, MESSAGE_TYPES) for message in arg)


def extract_config(kwargs: Mapping[str, Any], default: RetryConfig) -> tuple[dict[str, Any], RetryConfig]:
    """Split a `config` that is a RetryConfig from the other arguments; else `(kwargs, default)`."""
    config = kwargs.get("config")
    if not isinstance(config, RetryConfig):
        return dict(kwargs), default
    return {name: value for name, value in kwargs.items() if name != "config"}, config


class AICall:
    """A lazy call of `func(conversation, **kwargs)`; nothing runs before `run(call)` or `call("...")`.

    func: the AI function, or a model; it returns the rendered prompt followed by the replies.
    schema: handed to `func` first when set.
    conversation: the active conversation, the same list as the active sample's `data`.
    kwargs: further arguments of `func`; those used as placeholders are dropped after the first success.
    success: None before the first run, then whether the last run, or the last `airetry`, succeeded.
    error: the last exception a run ended with; later successes leave it.
    samples: the root of the sample tree, a holder of the prompt and not itself a sample.
    active_sample_id: the id of the active sample, -1 before the first.
    memory: free for the user.
    config: budgets and settings of retries.
    sampler: produces the samples of a round; None means one call of `func` after the other.
    """

    def __init__(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if not callable(func):
            raise TypeError(
                f"The first argument of an AICall is the function to call, got {type(func).__name__}."
            )
        self.func = func
        self.schema, self.conversation = unwrap_aicall_args(args)
        self.kwargs, self.config = extract_config(kwargs, RetryConfig())
        self.sampler: Any = self.kwargs.pop("sampler", None)
        self.success: bool | None = None
        self.error: Exception | None = None
        self.samples = SampleNode(list(self.conversation))
        self.active_sample_id = -1
        self.memory: dict[Any, Any] = {}
        # True until the root holds the prompt as the model saw it.
        self.prompt_is_raw = True

    def __call__(self, message: str | UserMessage, **kwargs: Any) -> Self:
        """Add a user message to the conversation and run."""
        if not isinstance(message, str | UserMessage):
            raise TypeError(f"A call takes a string or a UserMessage, got {type(message).__name__}.")
        self.conversation.append(UserMessage(message) if isinstance(message, str) else message)
        return self.run(**kwargs)

    def run(
        self,
        verbose: int = 1,
        catch_errors: bool | None = None,
        return_all: bool = True,
        *,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> Self:
        """Generate `config.n_samples` samples from the active one; see `run`."""
        if not return_all:
            raise ValueError("return_all must be True: the samples are whole conversations.")
        run_round(self, verbose, catch_errors, sampler, None, kwargs)
        return self

    @property
    def is_valid(self) -> bool:
        """Whether the last run, or the last `airetry`, succeeded."""
        return self.success is True

    def copy(self) -> Self:
        """An independent call: samples and config copied deeply, conversation and memory shallowly."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.kwargs, twin.memory = dict(self.kwargs), dict(self.memory)
        twin.conversation = list(self.conversation)
        twin.samples, twin.config = copy.deepcopy(self.samples), self.config.copy()
        active = find_node(self.samples, self.active_sample_id)
        twin_active = find_node(twin.samples, self.active_sample_id)
        if active is not None and twin_active is not None and active.data is self.conversation:
            # The messages are the same, so the one with feedback is too.
            twin_active.data, twin_active.feedback_message = twin.conversation, active.feedback_message
        return twin

    def __copy__(self) -> Self:
        return self.copy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AICall):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in COMPARED_FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        text = f"AICall{{{name}}}(Messages: {len(self.conversation)}, Success: {self.success})"
        last = self.conversation[-1] if self.conversation else None
        if isinstance(last, AIMessage):
            text += f"\n{PREVIEW_HEADING}\n {last.content[:PREVIEW_LENGTH]}"
        return text


class AIGenerate(AICall):
    """A lazy `aigenerate`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(aigenerate, *args, **kwargs)


class AIExtract(AICall):
    """A lazy `aiextract`; needs `return_type`, a pydantic model class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(aiextract, *args, **kwargs)


class AIClassify(AICall):
    """A lazy `aiclassify`; needs `choices`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(aiclassify, *args, **kwargs)


class AIScan(AICall):
    """A lazy `aiscan`; takes `image_url` and `image_path`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(aiscan, *args, **kwargs)


class AIEmbed(AICall):
    """A lazy `aiembed`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(aiembed, *args, **kwargs)


def is_valid(aicall: AICall) -> bool:
    """Whether the last run succeeded; as a condition of `airetry` it retries failed model calls."""
    return aicall.success is True


def run_round(
    call: AICall,
    verbose: int,
    catch_errors: bool | None,
    sampler: Sampler | None,
    condition: Callable[[AICall], Any] | None,
    kwargs: dict[str, Any],
) -> None:
    """Generate one round of samples and put them into the call's tree."""
    chosen: Sampler = sampler or call.sampler or SequentialSampler()
    if not hasattr(chosen, "sample"):
        raise TypeError(f"{type(chosen).__name__} is an asynchronous sampler; use run_async, airetry_async.")
    with collecting(call, verbose, catch_errors, condition, kwargs) as collection:
        for conversation in chosen.sample(collection.round):
            collection.add(conversation)


class Runnable(Protocol):
    """Anything with a `run` method: a lazy call or a code fixer."""

    def run(self, verbose: int = 1, **kwargs: Any) -> Any:
        """Run and return itself."""
        ...


R = TypeVar("R", bound=Runnable)


def run(lazy: R, verbose: int = 1, **kwargs: Any) -> R:
    """Run a lazy call or a code fixer and return it.

    A call generates `config.n_samples` samples as children of the active sample. `catch_errors` (default
    `config.catch_errors`) records an exception in `call.error` instead of raising it; samples made before it
    stay. `sampler` replaces the call's sampler for this run. Other arguments go to the function.
    """
    if not hasattr(lazy, "run"):
        raise TypeError(f"run takes a lazy call or a code fixer, got {type(lazy).__name__}.")
    lazy.run(verbose=verbose, **kwargs)
    return lazy
