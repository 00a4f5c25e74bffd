"""Engines in this process: a `vllm.LLM`, or vLLM's asynchronous engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from dataclasses import dataclass
from typing import Any

from .engine import EngineAnswer, EngineCall, answer_of
from .errors import EngineCallError
from .frame import ChatFrame, Message, read_frame
from .program import NAME

_numbers = itertools.count(1)


class _LocalEngine:
    """What both share: the model's tokenizer and chat template are at hand."""

    def __init__(self, engine: Any, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self._engine = engine
        self._template = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        self._frame: ChatFrame | None = None
        self._heads: dict[str, tuple[int, ...]] = {}
        self.context = int(engine.model_config.max_model_len)

    async def frame(self) -> ChatFrame:
        if self._frame is None:
            self._frame = await read_frame(self._render)
        return self._frame

    async def token_ids(self, text: str) -> tuple[int, ...]:
        if text not in self._heads:
            tokens = self._engine.renderer.get_tokenizer().encode(text, add_special_tokens=False)
            self._heads[text] = tuple(tokens)
        return self._heads[text]

    async def aclose(self) -> None:
        """The engine is the caller's, and stays."""

    async def _render(self, messages: list[Message]) -> str:
        from vllm.renderers import ChatParams

        params = ChatParams(chat_template_kwargs={**self._template, "tokenize": False})
        _, prompt = self._engine.renderer.render_messages(messages, params)
        if "prompt" not in prompt:
            raise EngineCallError("this model's chat template gives tokens and no text; use openai_chat")
        text: str = prompt["prompt"]
        return text

    def _request(self, call: EngineCall) -> tuple[str, dict[str, Any], Any]:
        """Request id, prompt and sampling parameters, as vLLM takes them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        import aici_vllm

        params = SamplingParams(
            max_tokens=None, output_kind=RequestOutputKind.FINAL_ONLY, **dict(call.sampling)
        )
        params = aici_vllm.request_params(
            NAME,
            call.plan.as_json(),
            params,
            checkpoint=call.checkpoint,
            from_checkpoint=call.from_checkpoint,
            drop_checkpoints=call.drop,
        )
        return f"recursive-{os.getpid()}-{next(_numbers)}", {"prompt_token_ids": list(call.prompt)}, params


class AsyncLLMEngine(_LocalEngine):
    """An `AsyncLLM` whose engine arguments hold `**aici_vllm.engine_args()`."""

    async def send(self, call: EngineCall) -> EngineAnswer:
        request_id, prompt, params = self._request(call)
        final: Any = None
        try:
            async for output in self._engine.generate(prompt, params, request_id):
                final = output
        except ValueError as error:
            raise EngineCallError(f"the engine refused the call: {error}") from error
        return _answer(final)


class LLMEngine(_LocalEngine):
    """A `vllm.LLM` made with `**aici_vllm.engine_args()`.

    All calls share one thread, which steps the engine while any call is under way and then ends. The engine
    must not be used otherwise meanwhile.
    """

    def __init__(self, llm: Any, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(llm, chat_template_kwargs)
        self._stepper = _Stepper(llm.llm_engine)

    async def send(self, call: EngineCall) -> EngineAnswer:
        loop = asyncio.get_running_loop()
        job = _Job(*self._request(call), loop, loop.create_future())
        self._stepper.begin(job)
        try:
            return _answer(await job.future)
        except asyncio.CancelledError:
            self._stepper.abort(job)
            raise


@dataclass(eq=False)
class _Job:
    """A request under way, and the future that waits for its output."""

    request_id: str
    prompt: dict[str, Any]
    params: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def resolve(self, output: Any = None, error: Exception | None = None) -> None:
        """From the stepping thread: hand the output over, unless nobody waits any more."""

        def settle() -> None:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(output)
            else:
                self.future.set_exception(error)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(settle)


class _Stepper:
    """Steps an `LLMEngine` in a thread of its own for as long as there are jobs."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._new: list[_Job] = []
        self._aborted: list[_Job] = []
        self._jobs: dict[str, _Job] = {}
        self._running = False

    def begin(self, job: _Job) -> None:
        with self._lock:
            self._new.append(job)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="rlm-engine", daemon=True).start()

    def abort(self, job: _Job) -> None:
        """The next step does without the job; one that is over already is left alone."""
        with self._lock:
            self._aborted.append(job)

    def _run(self) -> None:
        try:
            while self._take_orders():
                for output in self._engine.step() if self._jobs else []:
                    if output.finished and (job := self._jobs.pop(output.request_id, None)) is not None:
                        job.resolve(output)
        except Exception as error:
            self._fail_all(error)

    def _take_orders(self) -> bool:
        """Begin and abort what was asked for since the last step; False when nothing is left to do."""
        with self._lock:
            new, self._new = self._new, []
            aborted, self._aborted = self._aborted, []
            if not (new or aborted or self._jobs):
                self._running = False
                return False
        self._jobs |= {job.request_id: job for job in new}
        for job in new:
            self._add(job)
        if ids := [job.request_id for job in aborted if self._jobs.pop(job.request_id, None) is not None]:
            self._engine.abort_request(ids)
        return True

    def _add(self, job: _Job) -> None:
        try:
            self._engine.add_request(job.request_id, job.prompt, job.params)
        except ValueError as error:
            wrapped = EngineCallError(f"the engine refused the call: {error}")
            wrapped.__cause__ = error
            del self._jobs[job.request_id]
            job.resolve(error=wrapped)

    def _fail_all(self, error: Exception) -> None:
        """Tell every call, and start over with the next one."""
        with self._lock:
            jobs, self._jobs = [*self._jobs.values(), *self._new], {}
            self._new, self._running = [], False
        for job in jobs:
            job.resolve(error=EngineCallError(f"the engine failed: {error}"))


def _answer(output: Any) -> EngineAnswer:
    from aici_vllm.offline import ControllerResult

    found = (getattr(output, "kv_transfer_params", None) or {}).get("controller")
    if found is None:
        raise EngineCallError("vLLM ended the request without the results of its controller")
    return answer_of(ControllerResult.from_json(found))
