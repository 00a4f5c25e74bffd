"""One round of samples: what is asked, who produces the samples, and how they enter the tree.

A sampler is the seam between the tree search and whatever produces samples. It receives a `SampleRound` and
yields one conversation per sample; it need not make one model call per sample, and with `parent` and
`condition` it knows which sample the round continues and which check the samples will face.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aici_vllm.agents.conversation import remove_used_kwargs, split_multi_samples
from aici_vllm.agents.messages import MESSAGE_TYPES, Conversation
from aici_vllm.agents.models.base import PromptSchema
from aici_vllm.agents.samples import SampleNode, expand, find_node

if TYPE_CHECKING:
    from aici_vllm.agents.calls import AICall

logger = logging.getLogger("aici_vllm.agents")

TEMPERATURE_STEP = 0.001


@dataclass(frozen=True)
class SampleRound:
    """What one round asks for: `n_samples` continuations of one conversation.

    `parent` is the node the samples become children of and `conversation` a snapshot of what they continue.
    `kwargs` go to the function as they are, `api_kwargs` are the sampling parameters. `calls_left` is how
    many samples the budget still allows. `base_temperature` is the configured one, None when the user set
    their own. `condition` is the check that `airetry` will make on the samples, None in a plain run.
    """

    func: Callable[..., Any]
    schema: PromptSchema | None
    parent: SampleNode
    conversation: Conversation
    kwargs: dict[str, Any]
    api_kwargs: dict[str, Any]
    base_temperature: float | None
    n_samples: int
    calls_left: int
    condition: Callable[[AICall], Any] | None = None

    def sampling(self, request: int) -> dict[str, Any]:
        """Sampling parameters of the request with this number (from 1).

        The configured temperature grows a little with each request, so that a response cache cannot answer
        the second one with the first one's reply; a temperature of 0 stays.
        """
        if self.base_temperature is None:
            return dict(self.api_kwargs)
        step = TEMPERATURE_STEP * request if self.base_temperature != 0 else 0.0
        return {"temperature": round(self.base_temperature + step, 9), **self.api_kwargs}

    def call(self, request: int) -> Any:
        """Call the function for one request; returns what it returns."""
        positional = (
            [list(self.conversation)] if self.schema is None else [self.schema, list(self.conversation)]
        )
        kwargs = {**self.kwargs, "api_kwargs": self.sampling(request), "return_all": True}
        return self.func(*positional, **kwargs)


class Sampler(Protocol):
    """Produces the samples of a round, each as a whole conversation: the rendered prompt and one reply."""

    def sample(self, round: SampleRound) -> Iterator[Conversation]:
        """Yield conversations until the round has enough; an exception ends the round."""
        ...


class AsyncSampler(Protocol):
    """A sampler for `run_async` and `airetry_async`."""

    def sample_async(self, round: SampleRound) -> AsyncIterator[Conversation]:
        """Yield conversations until the round has enough; an exception ends the round."""
        ...


class SequentialSampler:
    """One model call after the other until the round has its samples or the budget ends."""

    def sample(self, round: SampleRound) -> Iterator[Conversation]:
        """Yield the samples of each reply as it arrives."""
        collected, request = 0, 0
        while collected < min(round.n_samples, round.calls_left):
            request += 1
            samples = samples_of(round.call(request))
            yield from samples
            collected += len(samples)


def samples_of(result: Any) -> list[Conversation]:
    """The conversations in what a model function returned. Raises TypeError when it is not a conversation."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("The model function is asynchronous; use run_async and airetry_async.")
    if not isinstance(result, list) or not all(isinstance(message, MESSAGE_TYPES) for message in result):
        raise TypeError(
            "A model function must return the whole conversation as a list of messages, "
            f"got {type(result).__name__}."
        )
    return split_multi_samples(result)


def effective_verbose(call: AICall, verbose: int) -> int:
    """The verbosity of a run: the argument, or less if the call itself asks for less."""
    return min(int(verbose), int(call.kwargs.get("verbose", verbose)))


@contextmanager
def collecting(
    call: AICall,
    verbose: int,
    catch_errors: bool | None,
    condition: Callable[[AICall], Any] | None,
    kwargs: dict[str, Any],
) -> Iterator[Collection]:
    """One round of a call: hand each sample to `add` in the body, and the call is left in order after it.

    An exception of the body is recorded in the call. It is raised unless errors are caught; an interrupt or
    a cancellation always is. Samples added before it stay.
    """
    verbose = effective_verbose(call, verbose)
    catching = call.config.catch_errors if catch_errors is None else catch_errors
    collection = Collection(call, start_round(call, kwargs, condition))
    try:
        yield collection
    except BaseException as error:
        collection.fail(error)
        if not catching or not isinstance(error, Exception):
            raise
    collection.finish(verbose)


@dataclass
class Collection:
    """The samples of a round on their way into the call's tree."""

    call: AICall
    round: SampleRound
    collected: int = 0

    def add(self, conversation: Conversation) -> None:
        """Put one sample into the tree and make it the active one."""
        node = expand(self.round.parent, list(conversation), success=True)
        self.call.active_sample_id = node.id
        self.call.config.calls += 1
        self.call.success = True
        self.collected += 1

    def fail(self, error: BaseException) -> None:
        """Record that the round failed, and why; an interrupt or cancellation is no error of the call."""
        self.call.success = False
        if isinstance(error, Exception):
            self.call.error = error

    def finish(self, verbose: int) -> None:
        """After the last sample: the call shows the active sample, and used arguments are dropped."""
        call, config = self.call, self.call.config
        if verbose >= 1 and self.collected < self.round.n_samples and config.calls >= config.max_calls:
            logger.info("Max calls limit reached (calls: %d). Generation interrupted.", config.calls)
        active = find_node(call.samples, call.active_sample_id)
        if call.success is not True or active is None:
            return
        call.conversation = active.data
        call.kwargs = remove_used_kwargs(call.kwargs, call.conversation)
        if active.parent is call.samples and call.prompt_is_raw:
            call.samples.data = list(call.conversation[:-1])
            call.prompt_is_raw = False


def start_round(
    call: AICall, kwargs: dict[str, Any], condition: Callable[[AICall], Any] | None = None
) -> SampleRound:
    """The round a run of `call` with `kwargs` asks for, from the active sample or else from the root."""
    config = call.config
    parent = find_node(call.samples, call.active_sample_id) or call.samples
    if parent is call.samples and call.prompt_is_raw and call.conversation is not parent.data:
        # A first call that fails must leave the prompt where a retry finds it.
        parent.data = list(call.conversation)
    merged = {**call.kwargs, **kwargs}
    api_kwargs = {**(call.kwargs.get("api_kwargs") or {}), **(kwargs.get("api_kwargs") or {})}
    merged.pop("api_kwargs", None)
    return SampleRound(
        func=call.func,
        schema=call.schema,
        parent=parent,
        conversation=list(call.conversation),
        kwargs=merged,
        api_kwargs=api_kwargs,
        base_temperature=None if "temperature" in api_kwargs else config.temperature,
        n_samples=config.n_samples,
        calls_left=max(0, config.max_calls - config.calls),
        condition=condition,
    )
