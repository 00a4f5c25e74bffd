"""The entry point for vLLM's server, and the only file here that knows the engine."""

import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.tracing import extract_trace_headers

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.engine import admission, compat
from aici_vllm.engine.live import EVENTS
from aici_vllm.engine.results import RESULTS_KEY
from aici_vllm.engine.vocabulary import read_vocabulary
from aici_vllm.server import routes
from aici_vllm.server.catalog import Catalog
from aici_vllm.server.errors import ServiceError, StoreError, UnknownControllerError, bad_request
from aici_vllm.server.protocol import RunRequest
from aici_vllm.server.runs import Rendered
from aici_vllm.server.settings import ServerSettings
from aici_vllm.server.store import Store

logger = logging.getLogger(__name__)


class ControllerEndpoints:
    """vLLM's endpoint plugin `aici`: on when `VLLM_PLUGINS` names it, as `aici serve` does."""

    name = "aici"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        compat.require_supported()
        routes.attach(app)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Open the store, and let requests name what is in it.

        Raises:
            ValueError: the operator's settings make no sense.
        """
        if engine_client is None:
            return
        config = engine_client.vllm_config
        settings = ServerSettings.from_config(admission.operator_config(config).get("server", {}))
        store = Store(settings.store, settings.store_bytes, settings.tags, settings.tags_of_user)
        catalog = Catalog(store, admission.operator_limits(config), admission.installed_controllers)
        try:
            store.tags()
        except StoreError as error:
            logger.error("%s: controllers cannot be stored or named until this is mended", error)
        admission.resolve_names_with(_resolver(catalog))
        compat.check_openai_requests_with(admission.has_controller, admission.checked_arguments)
        compat.keep_merged_lists(EVENTS)
        has_keys = any(args.api_key or [envs.VLLM_API_KEY])
        state.aici = routes.Service(settings, catalog, VLLMFront(engine_client, state), has_keys)


def _resolver(catalog: Catalog) -> Callable[[str], str | None]:
    """`catalog.source_of` with the errors that vLLM's routes can answer."""

    def resolve(name: str) -> str | None:
        try:
            return catalog.source_of(name)
        except UnknownControllerError as error:
            raise BadRequestError(error.message) from None
        except StoreError as error:
            logger.error("looking up controller %r: %s", name, error)
            raise GracefulHTTPError(error.message, error.status) from error

    return resolve


class VLLMFront:
    """What runs need of vLLM's server, whose own completion routes do the rendering."""

    live_key = admission.LIVE
    events_key = EVENTS
    results_key = RESULTS_KEY

    def __init__(self, engine_client: EngineClient, state: State):
        self._engine = engine_client
        self._state = state
        self.context = engine_client.model_config.max_model_len
        # Now, and not when the first run asks: it takes a second. Without controllers nothing asks.
        runs = admission.runs_controllers(engine_client.vllm_config)
        self._vocabulary = read_vocabulary(engine_client.model_config) if runs else None

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text."""
        assert self._vocabulary is not None
        return self._vocabulary.detokenize([token])

    async def render(self, request: RunRequest, prompt: str) -> Rendered:
        """The prompt, or the messages in the model's chat template, as tokens.

        Raises:
            ServiceError: there is no such model, or the prompt is refused.
        """
        inputs = await self._render(request, prompt)
        if isinstance(inputs, ErrorResponse):
            raise ServiceError(HTTPStatus(inputs.error.code), inputs.error.message)
        (engine_input,) = inputs
        models = self._state.openai_serving_models
        lora = models.lora_requests.get(request.model)
        length = len(engine_input["prompt_token_ids"])
        return Rendered(engine_input, length, models.model_name(lora), lora)

    async def _render(self, request: RunRequest, prompt: str) -> Any:
        # vLLM refuses "", and takes [""] for the same.
        try:
            if request.messages is None:
                completion = CompletionRequest.model_validate({"model": request.model, "prompt": [prompt]})
                return await self._state.openai_serving_completion.render_completion_request(completion)
            chat = ChatCompletionRequest.model_validate(
                {"model": request.model, "messages": request.messages}
            )
            answer = await self._state.openai_serving_chat.render_chat_request(chat)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise bad_request(f"{where}: {first['msg']}") from None
        return answer if isinstance(answer, ErrorResponse) else answer[1]

    def admit(self, rendered: Rendered, params: SamplingParams) -> tuple[Rendered, SamplingParams]:
        """Refuse what the engine would refuse; fill an empty prompt, and resolve a stored name.

        Raises:
            ServiceError: what is wrong with the request.
        """
        config = self._engine.vllm_config
        try:
            prompt, params = admission.admit(config, rendered.prompt, params)
        except ValueError as error:
            raise bad_request(str(error)) from None
        if prompt.get("prompt_token_ids") == []:
            prompt = {**prompt, "prompt_token_ids": admission.empty_prompt(config)}
        return replace(rendered, prompt=prompt), params

    async def generate(
        self, rendered: Rendered, params: SamplingParams, request_id: str, headers: Mapping[str, str]
    ) -> AsyncIterator[RequestOutput]:
        """Run it; leaving the iterator ends the request."""
        traced = await self._engine.is_tracing_enabled()
        more: dict[str, Any] = {"trace_headers": extract_trace_headers(headers)} if traced else {}
        outputs = self._engine.generate(
            rendered.prompt, params, request_id, lora_request=rendered.lora, **more
        )
        async for output in outputs:
            yield output
