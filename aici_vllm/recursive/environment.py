"""The REPL environment: one episode of blocks run in a sandbox, watched for a final answer."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from .chat import is_async, run_to_end, settle, with_model
from .controller import RecursiveController, create_server_recursive_controller
from .deadline import NEVER, Deadline
from .finalize import ContextGuard, Marker, find_marker
from .models import CodeBlockResult, EnvironmentMetadata, REPLAction, REPLObservation, REPLState
from .rubrics import REPLRubric
from .sandbox import BlockOutcome, Sandbox, SandboxLimits

HF_ROUTER = "https://router.huggingface.co/v1"
_FINAL_OF_ANSWER = """[f"{answer.get('content', '')}"] if answer.get('ready') else None"""
_PARTIAL_ANSWER = """f"{answer['content']}" """


class REPLEnvironment:
    """Runs code blocks on a context and says when the task is finished, and with which answer.

    A final answer is taken, in this order, from the helpers `FINAL(...)` and `FINAL_VAR(...)` wherever the
    block called them, from a marker that fills whole lines of the output and does not stand in the context,
    and from the `answer` dict once its `ready` is set. With `strict=True` markers in the output are ignored.

    `reset` and `step` are synchronous. `areset` and `astep` do the same inside an event loop, hold no thread
    while they wait, and take coroutine functions as `llm_query_fn` and the others. An episode is driven with
    one or the other, not with both.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(
        self,
        context: str | None = None,
        task_prompt: str | None = None,
        max_iterations: int = 30,
        max_output_length: int = 8192,
        context_preview_length: int = 500,
        rubric: REPLRubric | None = None,
        llm_query_fn: Callable[..., Any] | None = None,
        llm_batch_fn: Callable[..., Any] | None = None,
        subcall_fn: Callable[..., Any] | None = None,
        subcall_batch_fn: Callable[..., Any] | None = None,
        rlm_max_depth: int = 1,
        rlm_max_iterations: int | None = None,
        *,
        strict: bool = False,
        sandbox_limits: SandboxLimits | None = None,
    ) -> None:
        self.initial_context = context or os.environ.get("REPL_CONTEXT", "")
        self.initial_task_prompt = task_prompt or os.environ.get("REPL_TASK_PROMPT", "")
        self.max_iterations = int(os.environ.get("REPL_MAX_ITERATIONS", max_iterations))
        self.max_output_length = max_output_length
        self.context_preview_length = context_preview_length
        self.rubric = rubric or REPLRubric()
        self.llm_query_fn = llm_query_fn
        self.llm_batch_fn = llm_batch_fn
        self.subcall_fn = subcall_fn
        self.subcall_batch_fn = subcall_batch_fn
        self.rlm_max_depth = rlm_max_depth
        self.rlm_max_iterations = rlm_max_iterations or max_iterations
        self.strict = strict
        self.sandbox_limits = sandbox_limits
        self.deadline: Deadline = NEVER
        self._state: REPLState | None = None
        self._executor: Sandbox | None = None
        self._controller: RecursiveController | None = None
        self._controller_chat_fn: Callable[..., str] | None = None

    # The episode

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        context: str | None = None,
        task_prompt: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        **kwargs: Any,
    ) -> REPLObservation:
        """Begin an episode with a fresh sandbox, whose `random` module starts from `seed`.

        `expected_answer`, `rlm_max_depth` and `rlm_max_iterations` are taken as further keywords. Where the
        environment has no model functions and a token is at hand (`hf_token`, else the variable `HF_TOKEN`),
        they are made from it.
        """
        self.close()
        run_to_end(self._begin(False, seed, episode_id, context, task_prompt, hf_token, llm_model, kwargs))
        return self._first_observation()

    async def areset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        context: str | None = None,
        task_prompt: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        **kwargs: Any,
    ) -> REPLObservation:
        """`reset` inside an event loop."""
        await self.aclose()
        await self._begin(True, seed, episode_id, context, task_prompt, hf_token, llm_model, kwargs)
        return self._first_observation()

    def step(self, action: REPLAction, timeout_s: float | None = None, **kwargs: Any) -> REPLObservation:
        """Run one block, or take an explicit final answer.

        `timeout_s` is accepted and not used: the time of a block is limited by `sandbox_limits`.

        Raises:
            RuntimeError: `reset` was not called.
        """
        return run_to_end(self._step(action))

    async def astep(self, action: REPLAction) -> REPLObservation:
        """`step` inside an event loop."""
        return await self._step(action)

    @property
    def state(self) -> REPLState:
        """The state of the episode.

        Raises:
            RuntimeError: `reset` was not called.
        """
        if self._state is None:
            raise RuntimeError("Environment not initialized. Call reset() first.")
        return self._state

    def get_metadata(self) -> EnvironmentMetadata:
        return EnvironmentMetadata(
            name="repl_env",
            description="A Python REPL for language models that work on a long context by writing code",
            version="0.1.0",
        )

    def close(self) -> None:
        """End the episode and hand the sandbox's worker back."""
        executor, self._executor, self._state = self._executor, None, None
        if executor is not None:
            run_to_end(executor.close())

    async def aclose(self) -> None:
        """`close` inside an event loop."""
        executor, self._executor, self._state = self._executor, None, None
        if executor is not None:
            await executor.close()

    async def variable(self, name: str) -> str | None:
        """The text of a variable of the REPL, or None when it is missing or None."""
        if self._executor is None or not name.isidentifier():
            return None
        return await self._executor.value(f'f"{{{name}}}" if {name} is not None else None')

    # Beginning

    async def _begin(
        self,
        asynchronous: bool,
        seed: int | None,
        episode_id: str | None,
        context: str | None,
        task_prompt: str | None,
        hf_token: str | None,
        llm_model: str | None,
        options: dict[str, Any],
    ) -> None:
        self.rubric.reset()
        if options.get("expected_answer") is not None:
            self.rubric.set_expected(options["expected_answer"])
        self._connect(hf_token, llm_model, options.get("rlm_max_depth"), options.get("rlm_max_iterations"))
        context = context or self.initial_context
        self._final: list[tuple[str, str]] = []
        self._snapshot: dict[str, str] = {}
        self._last_trace = "NoneType: None"
        self._guard = ContextGuard(context)
        variables: dict[str, Any] = {"answer": {"content": "", "ready": False}}
        if context:
            variables["context"] = context
        self._executor = Sandbox(
            self._tools(),
            variables,
            self.sandbox_limits,
            asynchronous=asynchronous,
            seed=seed,
            on_final=self._take_final,
        )
        self._state = REPLState(
            episode_id=episode_id or str(uuid4()),
            context=context,
            task_prompt=task_prompt or self.initial_task_prompt,
            max_iterations=self.max_iterations,
        )
        await self._look()

    def _first_observation(self) -> REPLObservation:
        state = self.state
        lines = ["REPL environment ready."]
        if state.context:
            lines.append(f"The variable context holds {len(state.context)} characters.")
        if state.task_prompt:
            lines.append(f"Task: {state.task_prompt}")
        observation = self._observation(CodeBlockResult(stdout="\n".join(lines)), done=False)
        observation.metadata = {"task_prompt": state.task_prompt, "message": "Environment ready."}
        return observation

    def _connect(
        self, hf_token: str | None, llm_model: str | None, depth: int | None, iterations: int | None
    ) -> None:
        """Make or rebuild the model functions that come from a token; functions given by the user stay."""
        wanted = (
            self.rlm_max_depth if depth is None else int(depth),
            self.rlm_max_iterations if iterations is None else int(iterations),
        )
        changed = wanted != (self.rlm_max_depth, self.rlm_max_iterations)
        self.rlm_max_depth, self.rlm_max_iterations = wanted
        if not self.llm_query_fn:
            token = hf_token if hf_token is not None else os.environ.get("HF_TOKEN")
            if not token:
                return
            self._controller_chat_fn = self._build_hf_chat_fn(token, llm_model)
        elif self._controller is None:
            return
        elif not changed:
            self._controller.start_episode()
            return
        self._install_controller()

    def _install_controller(self) -> None:
        assert self._controller_chat_fn is not None
        self._controller = create_server_recursive_controller(
            self._controller_chat_fn, max_depth=self.rlm_max_depth, max_iterations=self.rlm_max_iterations
        )
        self.llm_query_fn, self.llm_batch_fn = self._controller.llm_query_fn, self._controller.llm_batch_fn
        self.subcall_fn, self.subcall_batch_fn = self._controller.rlm_query_fn, self._controller.rlm_batch_fn

    @staticmethod
    def _build_hf_chat_fn(hf_token: str | None, llm_model: str | None = None) -> Callable[..., str]:
        from .openai_chat import openai_chat

        model = llm_model or os.environ.get("LLM_MODEL", "Qwen/Qwen3.5-9B")
        return openai_chat(HF_ROUTER, model, api_key=hf_token, max_tokens=2048, temperature=0.6, top_p=0.95)

    def _tools(self) -> dict[str, Callable[..., Any]]:
        """The host functions of the REPL by name; recursive queries fall back to plain ones."""
        tools: dict[str, Callable[..., Any]] = {
            "format_exc": lambda: self._last_trace,
            "safe_json_dumps": lambda value, **options: json.dumps(value, default=str, **options),
        }
        single, batched = self.llm_query_fn, self.llm_batch_fn
        if single:
            tools["llm_query"] = _query_tool(single, "llm_query")
        if batched:
            tools["llm_query_batched"] = tools["llm_batch"] = _batch_tool(batched, "llm_query_batched")
        if recursive := self.subcall_fn or single:
            tools["rlm_query"] = _query_tool(recursive, "rlm_query")
        if recursive_batched := self.subcall_batch_fn or batched:
            tools["rlm_query_batched"] = _batch_tool(recursive_batched, "rlm_query_batched")
        return tools

    def _take_final(self, answer: str) -> str:
        marker = f"FINAL({answer})"
        self._final.append((marker, answer))
        return marker

    # A step

    async def _step(self, action: REPLAction) -> REPLObservation:
        if self._state is None or self._executor is None:
            raise RuntimeError("Environment not initialized. Call reset() first.")
        state = self._state
        state.step_count += 1
        state.iteration += 1
        if action.is_final:
            state.final_answer = action.final_answer or ""
            return self._rewarded(action, self._ended("Final answer submitted."))
        if state.iteration >= self.max_iterations:
            state.final_answer = await self._executor.value(_PARTIAL_ANSWER) or None
            return self._rewarded(action, self._ended(f"Maximum iterations ({self.max_iterations}) reached."))
        self._final = []
        outcome = await self._executor.run(action.code, self.deadline)
        if outcome.error is not None:
            self._last_trace = outcome.trace
        answer = await self._answer_of(outcome)
        if answer is not None:
            state.final_answer = answer
        state.total_execution_time += outcome.seconds
        before = self._snapshot
        await self._look()
        changed = {name: text for name, text in self._snapshot.items() if before.get(name) != text}
        observation = self._observation(self._block_result(outcome, changed), done=answer is not None)
        observation.metadata["execution_time"] = outcome.seconds
        return self._rewarded(action, observation)

    async def _answer_of(self, outcome: BlockOutcome) -> str | None:
        assert self._executor is not None
        if self._final:
            return self._recorded_answer(outcome.stdout)
        marker = None if self.strict else find_marker(outcome.stdout, self._guard)
        if marker is not None:
            answer = await self.resolve(marker)
            if answer is not None:
                return answer
        ready = await self._executor.value(_FINAL_OF_ANSWER)
        return ready[0] if ready else None

    def _recorded_answer(self, stdout: str) -> str:
        """Of several helper calls in one block: the one printed first, else the last one."""
        printed = [(stdout.find(marker), answer) for marker, answer in self._final if marker in stdout]
        return min(printed)[1] if printed else self._final[-1][1]

    async def resolve(self, marker: Marker) -> str | None:
        """The answer a marker stands for; None for a variable that is missing or None."""
        return marker.answer if marker.kind == "answer" else await self.variable(marker.answer)

    async def _look(self) -> None:
        assert self._executor is not None and self._state is not None
        self._snapshot = await self._executor.variables()
        self._state.namespace_keys = sorted({*self._snapshot, *self._executor.function_names})

    def _block_result(self, outcome: BlockOutcome, changed: dict[str, str]) -> CodeBlockResult:
        stderr = outcome.stderr + ("\n" if outcome.stderr and outcome.trace else "") + outcome.trace
        return CodeBlockResult(
            stdout=self._shortened(outcome.stdout),
            stderr=self._shortened(stderr),
            locals_snapshot=changed,
            execution_time=outcome.seconds,
            success=outcome.error is None,
            exception=outcome.error,
        )

    def _shortened(self, text: str) -> str:
        if len(text) <= self.max_output_length:
            return text
        return f"{text[: self.max_output_length]}\n... (truncated, total {len(text)} chars)"

    def _ended(self, message: str) -> REPLObservation:
        return self._observation(CodeBlockResult(stdout=message), done=True)

    def _observation(self, result: CodeBlockResult, *, done: bool) -> REPLObservation:
        state = self.state
        context = state.context or ""
        return REPLObservation(
            result=result,
            context_preview=context[: self.context_preview_length] or None,
            context_length=len(context),
            available_variables=state.namespace_keys,
            iteration=state.iteration,
            max_iterations=self.max_iterations,
            done=done,
            metadata={
                "task_prompt": state.task_prompt,
                "final_answer": state.final_answer,
                "execution_time": result.execution_time,
            },
        )

    def _rewarded(self, action: REPLAction, observation: REPLObservation) -> REPLObservation:
        observation.reward = self.rubric(action, observation)
        return observation


def _query_tool(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    call = with_model(function)

    def query(prompt: Any, model: str | None = None, **extra: Any) -> Any:
        return call(prompt if isinstance(prompt, str) else str(prompt), model, **extra)

    query.__qualname__ = name
    return _same_kind(query, function)


def _batch_tool(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    call = with_model(function)

    def query(prompts: Any, model: str | None = None, **extra: Any) -> Any:
        if not isinstance(prompts, list | tuple):
            raise TypeError(f"{name} takes a list of prompts, not {type(prompts).__name__}")
        texts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in prompts]
        return call(texts, model, **extra) if texts else []

    query.__qualname__ = name
    return _same_kind(query, function)


def _same_kind(tool: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`tool`, as a coroutine function where the wrapped function is one."""
    if not is_async(function):
        return tool

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        result: Awaitable[Any] = tool(*args, **kwargs)
        return await settle(result)

    return awaited
