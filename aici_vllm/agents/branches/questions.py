"""The model calls of one round, held at their questions, so that an engine can answer all of them at once."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aici_vllm.agents.messages import Conversation, Message
from aici_vllm.agents.models.base import ChatRequest, PromptSchema, Reply, attach_replies, prepare_request
from aici_vllm.agents.rounds import SampleRound, samples_of


class Asked:
    """One question of a round to its model; awaiting it gives the replies, or raises `error`."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.replies: list[Reply] = []
        self.error: Exception | None = None

    def __await__(self) -> Generator[Asked, None, list[Reply]]:
        yield self
        if self.error is not None:
            raise self.error
        return self.replies


class BranchModel(PromptSchema):
    """Stands in for the model of a round's function, and hands each question to the sampler."""

    def __init__(self, rng: random.Random | None) -> None:
        self._rng = rng

    async def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        request = prepare_request(conversation, kwargs)
        return attach_replies(request.prompt, await Asked(request), self._rng)


class Questions:
    """The calls of a round's function: each runs up to its question, and on when that has its replies."""

    def __init__(self, round: SampleRound, model: PromptSchema) -> None:
        self._round = with_model(round, model)
        self._wanted = min(round.n_samples, round.calls_left)
        self._per_call = max(1, int(round.api_kwargs.get("n") or 1))
        self._begun = self._collected = 0
        self._calls: list[_Call] = []

    def begin(self) -> bool:
        """Start as many calls as the round still lacks samples; False when it lacks none.

        Raises TypeError when the function does not ask the model it is given.
        """
        missing = math.ceil((self._wanted - self._collected) / self._per_call)
        self._calls = []
        for _ in range(missing):
            self._begun += 1
            result = self._round.call(self._begun)
            if not inspect.iscoroutine(result):
                raise TypeError(
                    "Branches need a function that asks the model it is given as model=, such as aigenerate; "
                    f"{_name(self._round.func)} returned {type(result).__name__} without asking."
                )
            self._calls.append(_Call(result))
            self._calls[-1].advance()
        return missing > 0

    def open(self) -> list[Asked]:
        """The questions that wait for replies."""
        return [call.asked for call in self._calls if call.asked is not None]

    def answered(self) -> None:
        """Go on with every call: its question has its replies or its error."""
        for call in self._calls:
            if call.asked is not None:
                call.advance()

    def samples(self) -> Iterator[Conversation]:
        """The samples of the calls, in order. Raises the error of the first call that failed."""
        for call in self._calls:
            if call.error is not None:
                raise call.error
            for sample in samples_of(call.result):
                self._collected += 1
                yield sample

    def close(self) -> None:
        """End the calls that still wait."""
        for call in self._calls:
            call.coroutine.close()


@dataclass
class _Call:
    """One call of the function: waiting at `asked`, or over with a `result` or an `error`."""

    coroutine: Coroutine[Any, Any, Conversation]
    asked: Asked | None = None
    result: Conversation | None = None
    error: Exception | None = None

    def advance(self) -> None:
        """Run to the next question, or to the end."""
        self.asked = None
        try:
            asked = self.coroutine.send(None)
        except StopIteration as done:
            self.result = done.value
        except Exception as error:
            self.error = error
        else:
            if not isinstance(asked, Asked):
                raise TypeError(
                    f"The function awaited {type(asked).__name__}; in a branch it awaits its model."
                )
            self.asked = asked


def with_model(round: SampleRound, model: PromptSchema) -> SampleRound:
    """The round with `model` in place of its own."""
    if isinstance(round.func, PromptSchema):
        return replace(round, func=model, schema=None)
    others = {name: value for name, value in round.kwargs.items() if name != "model"}
    if round.schema is not None:
        return replace(round, schema=model, kwargs=others)
    return replace(round, kwargs={**others, "model": model})


def _name(func: Any) -> str:
    return getattr(func, "__name__", type(func).__name__)
