"""`POST /v1/run`: a request checked, run, and told in events as it goes."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from aici_vllm.server.catalog import NONE, PYCTRL, Catalog
from aici_vllm.server.errors import bad_request
from aici_vllm.server.events import RunEvents, plain_event
from aici_vllm.server.protocol import Error, ErrorAnswer, InitialRun, Run, RunRequest

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Rendered:
    """A request's prompt as the engine takes it.

    Attributes:
        prompt: what `generate` takes.
        length: its tokens.
        model: the name under which the server knows the model.
    """

    prompt: Any
    length: int
    model: str
    lora: LoRARequest | None = None


class Front(Protocol):
    """What runs need of vLLM's front-end.

    Attributes:
        context: the longest sequence the model can hold, in tokens.
        events_key, live_key, results_key: names of the engine's fields.
    """

    context: int
    live_key: str
    events_key: str
    results_key: str

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text."""
        ...

    async def render(self, request: RunRequest, prompt: str) -> Rendered:
        """The prompt, or the messages in the model's chat template, as tokens."""
        ...

    def admit(self, rendered: Rendered, params: SamplingParams) -> tuple[Rendered, SamplingParams]:
        """Refuse what the engine would refuse; fill an empty prompt, and resolve a stored name."""
        ...

    def generate(
        self, rendered: Rendered, params: SamplingParams, request_id: str, headers: Mapping[str, str]
    ) -> AsyncIterator[RequestOutput]:
        """Run it; leaving the iterator ends the request."""
        ...


@dataclass(frozen=True)
class PreparedRun:
    """A request that nothing speaks against."""

    id: str
    rendered: Rendered
    params: SamplingParams
    controlled: bool


async def prepare(front: Front, catalog: Catalog, request: RunRequest) -> PreparedRun:
    """Check everything that can be known before the engine runs.

    Raises:
        ServiceError: what is wrong with the request.
        Exception: whatever vLLM raises for a prompt or a model that it refuses.
    """
    _check_sampling(request)
    if request.messages is not None and request.prompt:
        raise bad_request("give prompt or messages, not both")
    controlled = request.controller != NONE
    arg = request.controller_arg
    arg = arg if isinstance(arg, str) else json.dumps(arg)
    rendered = await front.render(request, request.prompt if controlled else request.prompt or arg)
    params = _sampling_params(request, front.context - max(rendered.length, 1))
    if controlled:
        controller, arg = _controller(request.controller, arg)
        params.extra_args = {"controller": controller, "controller_arg": arg, front.live_key: True}
        # The text is made of the events: the engine's own would be made in vain.
        params.detokenize, params.output_kind = False, RequestOutputKind.CUMULATIVE
    # In a thread: scripts are parsed and read from disk, and other requests wait for the event loop.
    rendered, params = await asyncio.to_thread(front.admit, rendered, params)
    return PreparedRun(f"run-{uuid.uuid4()}", rendered, params, controlled)


def _controller(controller: str, arg: str) -> tuple[str, str]:
    if controller.split("/v")[0].removesuffix("/latest") in PYCTRL:
        return arg, ""
    if controller.startswith("gh:"):
        raise bad_request("this server downloads no controllers: upload the script and send its hash or tag")
    return controller, arg


def _check_sampling(request: RunRequest) -> None:
    temperature, top_p, top_k = _numbers(request)
    if top_k == 0:
        raise bad_request("top_k must be -1, for all tokens, or 1 or more")
    if temperature == 0 and (top_p < 1 or top_k != -1):
        raise bad_request("top_p and top_k have no meaning at temperature 0: leave them out")


def _numbers(request: RunRequest) -> tuple[float, float, int]:
    return (
        0.0 if request.temperature is None else request.temperature,
        1.0 if request.top_p is None else request.top_p,
        -1 if request.top_k is None else request.top_k,
    )


def _sampling_params(request: RunRequest, room: int) -> SamplingParams:
    if room < 1:
        raise bad_request("the prompt fills the model's context: there is no room for a single token more")
    if request.max_tokens is not None and request.max_tokens > room:
        raise bad_request(f"max_tokens is {request.max_tokens}, and the context has room for {room} tokens")
    temperature, top_p, top_k = _numbers(request)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=request.max_tokens or room,
        ignore_eos=request.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
    )


async def stream(front: Front, run: PreparedRun, headers: Mapping[str, str]) -> AsyncIterator[str]:
    """The run as server-sent events; leaving it ends the request."""
    yield _line(InitialRun(id=run.id, created=int(time.time()), model=run.rendered.model))
    outputs = front.generate(run.rendered, run.params, run.id, headers)
    events = _controlled_events(front, outputs) if run.controlled else _plain_events(outputs, run)
    try:
        async with aclosing(events):
            async for event in events:
                yield _line(event)
    except Exception as error:
        # The status line is out: all that is left is to say it here.
        logger.exception("run %s failed", run.id)
        yield f"data: {_failure(error).model_dump_json()}\n\n"
    yield DONE


async def _controlled_events(
    front: Front, outputs: AsyncIterator[RequestOutput]
) -> AsyncGenerator[Run, None]:
    """One event per step, the last of them with the results."""
    events = RunEvents(front.token_bytes)
    async for output in outputs:
        told = output.kv_transfer_params or {}
        steps = [events.step(event) for event in told.get(front.events_key, [])]
        if front.results_key in told:
            steps = steps or [events.step({"forks": [], "usage": told[front.results_key]["usage"]})]
            steps[-1].results = told[front.results_key]
        for step in steps:
            yield step


async def _plain_events(outputs: AsyncIterator[RequestOutput], run: PreparedRun) -> AsyncGenerator[Run, None]:
    sampled = 0
    async for output in outputs:
        one = output.outputs[0]
        sampled += len(one.token_ids)
        yield plain_event(one.text, sampled, run.rendered.length, one.finish_reason)


def _line(event: InitialRun | Run) -> str:
    return f"data: {event.model_dump_json()}\n\n"


def _failure(error: Exception) -> ErrorAnswer:
    # vLLM wraps what it did not expect, in an error that says nothing.
    message = str(error) or str(error.__cause__ or "") or "the engine failed: its log says why"
    code = HTTPStatus.INTERNAL_SERVER_ERROR
    return ErrorAnswer(error=Error(message=message, type=type(error).__name__, code=code))
