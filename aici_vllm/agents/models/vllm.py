"""Models in this process: a `vllm.LLM`, or vLLM's asynchronous engine."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from aici_vllm.agents.errors import ModelCallError
from aici_vllm.agents.messages import Conversation, Message
from aici_vllm.agents.models.base import (
    ChatRequest,
    PromptSchema,
    Reply,
    attach_replies,
    chat_dicts,
    prepare_request,
)


class VLLMModel(PromptSchema):
    """A `vllm.LLM` as a model: prompts go through the model's chat template.

    llm: the engine; `LLM.chat` and `LLM.embed` are used.
    sampling: default sampling parameters by name; a call's `api_kwargs` override them. Replies may be as
        long as the context allows unless `max_tokens` is set. `response_format` is understood as OpenAI
        servers do.
    chat_options: further arguments of `LLM.chat`, such as `chat_template` or `chat_template_kwargs`.
    """

    def __init__(
        self,
        llm: Any,
        *,
        sampling: Mapping[str, Any] | None = None,
        chat_options: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.llm = llm
        self._sampling = dict(sampling or {})
        self._chat_options = {"use_tqdm": False, **(chat_options or {})}
        self._rng = rng

    def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        """The prompt and the replies. Raises ModelCallError when the engine fails or refuses the request."""
        request = prepare_request(conversation, kwargs)
        params = sampling_params({**self._sampling, **request.api_kwargs})
        try:
            (output,) = self.llm.chat(chat_dicts(request.prompt), params, **self._chat_options)
        except Exception as error:
            raise ModelCallError(f"vLLM failed: {type(error).__name__}: {error}") from error
        return _conversation(request, output, self._rng)

    def embed(self, texts: Sequence[str], **kwargs: Any) -> list[list[float]]:
        """One vector per text; the engine must run an embedding model."""
        try:
            outputs = self.llm.embed(list(texts), use_tqdm=False)
        except Exception as error:
            raise ModelCallError(f"vLLM failed to embed: {type(error).__name__}: {error}") from error
        return [list(output.outputs.embedding) for output in outputs]


class AsyncVLLMModel(PromptSchema):
    """vLLM's asynchronous engine (`vllm.v1.engine.async_llm.AsyncLLM`) as a model.

    Requests run side by side in the engine; cancelling a call aborts its request. `chat_template` is a Jinja
    text, by default the model's own; `chat_template_kwargs` go to the template.
    """

    def __init__(
        self,
        engine: Any,
        *,
        sampling: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.engine = engine
        self._sampling = dict(sampling or {})
        self._chat_template = chat_template
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._rng = rng
        self._numbers = itertools.count(1)

    async def __call__(self, conversation: Sequence[Message], **kwargs: Any) -> Conversation:
        """The prompt and the replies. Raises ModelCallError when the engine fails or refuses the request."""
        request = prepare_request(conversation, kwargs)
        params = sampling_params({**self._sampling, **request.api_kwargs}, final_only=True)
        try:
            output = await self._generate(request, params)
        except Exception as error:
            raise ModelCallError(f"vLLM failed: {type(error).__name__}: {error}") from error
        if output is None:
            raise ModelCallError("vLLM ended the request without an output.")
        return _conversation(request, output, self._rng)

    async def _generate(self, request: ChatRequest, params: Any) -> Any:
        prompt = await self._engine_prompt(request)
        request_id = f"agents-{os.getpid()}-{id(self)}-{next(self._numbers)}"
        final = None
        async for output in self.engine.generate(prompt, params, request_id):
            final = output
        return final

    async def _engine_prompt(self, request: ChatRequest) -> Any:
        from vllm.renderers import ChatParams

        template = {
            "add_generation_prompt": True,
            "continue_final_message": False,
            **self._chat_template_kwargs,
        }
        chat = ChatParams(chat_template=self._chat_template, chat_template_kwargs=template)
        _, prompts = await self.engine.renderer.render_chat_async([chat_dicts(request.prompt)], chat)
        return prompts[0]


def sampling_params(api_kwargs: Mapping[str, Any], final_only: bool = False) -> Any:
    """`api_kwargs` as vLLM's SamplingParams. Raises ValueError for a name vLLM does not know."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    values = {"max_tokens": None, **api_kwargs}
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    if isinstance(values.get("logprobs"), bool):
        values["logprobs"] = int(values.pop("top_logprobs", 0)) if values["logprobs"] else None
    response_format = values.pop("response_format", None)
    if response_format is not None:
        values["structured_outputs"] = _structured_outputs(response_format)
    unknown = sorted(set(values) - set(SamplingParams.__struct_fields__))
    if unknown:
        raise ValueError(f"vLLM has no sampling parameters called {unknown}; remove them from api_kwargs.")
    if final_only:
        values["output_kind"] = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**values)


def _structured_outputs(response_format: Mapping[str, Any]) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    kind = response_format.get("type")
    if kind == "json_schema":
        return StructuredOutputsParams(json=response_format["json_schema"]["schema"])
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "text":
        return None
    raise ValueError(f"Unknown response_format type {kind!r}; use json_schema, json_object or text.")


def _conversation(request: ChatRequest, output: Any, rng: random.Random | None) -> Conversation:
    prompt_tokens = len(output.prompt_token_ids or ())
    replies = [
        Reply(
            reply.text, reply.cumulative_logprob, reply.finish_reason, (prompt_tokens, len(reply.token_ids))
        )
        for reply in output.outputs
    ]
    return attach_replies(request.prompt, replies, rng)
