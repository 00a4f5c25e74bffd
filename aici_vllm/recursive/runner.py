"""The runner: the turns of one RLM, from the first prompt to the final answer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .async_backends import AsyncChildRLMBackend
from .backends import (
    BackendLimits,
    ChildTrace,
    LocalChildRLMBackend,
    RecursiveBackend,
    SubcallComplete,
    SubcallStart,
)
from .budget import TokenBudgetExceeded
from .calltree import CallNode, preview
from .chat import ChatFn, call_off_loop, run_to_end, settle, with_model
from .deadline import NEVER, Deadline, DeadlineExceeded, call_within
from .environment import REPLEnvironment
from .finalize import ContextGuard, find_in_reply, find_marker
from .models import REPLAction, REPLObservation
from .prompts import (
    LAST_CHANCE,
    NO_CODE_NUDGE,
    RLM_SYSTEM_PROMPT,
    QueryMetadata,
    build_rlm_system_prompt,
    build_user_prompt,
    extract_code_blocks,
    format_observations,
)
from .sandbox import SandboxLimits


@dataclass
class RLMRunResult:
    """What a run gives. `tree` is the call tree of the run, with every node below it."""

    final_answer: str | None
    messages: list[dict[str, str]]
    iterations: int
    depth: int
    child_traces: list[ChildTrace] = field(default_factory=list)
    tree: CallNode | None = None


@dataclass
class _Run:
    """The state of one run while it lasts."""

    task: str
    model: str | None
    env: REPLEnvironment
    backend: Any
    node: CallNode
    deadline: Deadline
    asynchronous: bool
    messages: list[dict[str, str]]
    started: float = field(default_factory=time.perf_counter)
    iterations: int = 0


class LocalRLMRunner:
    """Runs a recursive language model on a context, with `llm_chat_fn` as the model.

    `run` takes a synchronous chat function and uses threads for batches, at most `max_batch_workers` in the
    whole tree. `arun` runs inside an event loop, takes a coroutine function too, and holds no thread while it
    waits for one. The root is at depth 0; with `max_depth=2` it may have children, and their own `rlm_query`
    is a plain call.

    `backend_factory(llm_chat_fn, system_prompt=, max_iterations=, max_depth=, depth=,
    env_max_iterations_multiplier=)` replaces the backend, for instance to give sub-calls a smaller model.
    `strict=True` takes final answers only from the helpers and the `answer` dict, never from text, and gives
    batches over `max_children_per_batch` their full length. `node`, when set before a run, is the node of the
    call tree that the run fills; `opening`, when set, is the conversation that it begins with.
    """

    def __init__(
        self,
        llm_chat_fn: ChatFn,
        *,
        system_prompt: str = RLM_SYSTEM_PROMPT,
        max_iterations: int = 30,
        max_depth: int = 2,
        depth: int = 0,
        env_max_iterations_multiplier: int = 5,
        max_batch_workers: int = 8,
        backend_factory: Callable[..., RecursiveBackend] | None = None,
        max_children_total: int | None = None,
        max_children_per_batch: int | None = None,
        result_truncation_limit: int | None = None,
        per_child_timeout_s: float | None = None,
        on_subcall_start: SubcallStart | None = None,
        on_subcall_complete: SubcallComplete | None = None,
        verbose: bool = False,
        strict: bool = False,
        sandbox_limits: SandboxLimits | None = None,
        quote_task_every_turn: bool = True,
    ) -> None:
        self.llm_chat_fn = llm_chat_fn
        self.system_prompt = system_prompt
        self.max_iterations = max_iterations
        self.max_depth = max_depth
        self.depth = depth
        self.env_max_iterations_multiplier = env_max_iterations_multiplier
        self.max_batch_workers = max_batch_workers
        self.backend_factory = backend_factory
        self.max_children_total = max_children_total
        self.max_children_per_batch = max_children_per_batch
        self.result_truncation_limit = result_truncation_limit
        self.per_child_timeout_s = per_child_timeout_s
        self.on_subcall_start = on_subcall_start
        self.on_subcall_complete = on_subcall_complete
        self.verbose = verbose
        self.strict = strict
        self.sandbox_limits = sandbox_limits
        self.quote_task_every_turn = quote_task_every_turn
        self.node: CallNode | None = None
        self.opening: list[dict[str, str]] | None = None
        self._chat_fn = with_model(llm_chat_fn)

    def run(
        self, context: str, task_prompt: str, *, model: str | None = None, timeout_s: float | None = None
    ) -> RLMRunResult:
        """Answer `task_prompt` about `context`.

        After `timeout_s` seconds the run ends at once with the answer `Error: child timeout after ...`; a
        model call that is still running then is left behind and its result dropped.

        Raises:
            Exception: whatever the chat function raised.
        """
        run = self._start(context, task_prompt, model, Deadline(timeout_s), False)
        try:
            return run_to_end(self._to_answer(run, context))
        finally:
            run.env.close()

    async def arun(
        self, context: str, task_prompt: str, *, model: str | None = None, timeout_s: float | None = None
    ) -> RLMRunResult:
        """`run` inside an event loop; on a timeout everything below this run is cancelled."""
        run = self._start(context, task_prompt, model, Deadline(timeout_s), True)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._to_answer(run, context)
        except TimeoutError:
            if not run.deadline.passed:
                raise
            return self._timed_out(run)
        finally:
            await run.env.aclose()
            if hasattr(run.backend, "aclose"):
                await run.backend.aclose()

    # Setting up

    def _start(
        self, context: str, task: str, model: str | None, deadline: Deadline, asynchronous: bool
    ) -> _Run:
        node, self.node = self.node or CallNode("run", self.depth, preview(task), model), None
        backend = self._make_backend(asynchronous)
        messages, self.opening = self.opening or self._first_messages(context, task), None
        limit = NEVER if asynchronous else deadline
        told = {"node": node, "deadline": limit, "messages": messages, "context": context}
        for name, value in told.items():
            if hasattr(backend, name):
                setattr(backend, name, value)
        env = REPLEnvironment(
            context,
            task,
            max_iterations=self.max_iterations * self.env_max_iterations_multiplier,
            llm_query_fn=backend.query,
            llm_batch_fn=backend.query_batched,
            subcall_fn=backend.recursive_query,
            subcall_batch_fn=backend.recursive_query_batched,
            strict=self.strict,
            sandbox_limits=self.sandbox_limits,
        )
        env.max_iterations = self.max_iterations * self.env_max_iterations_multiplier
        env.deadline = limit
        return _Run(task, model, env, backend, node, deadline, asynchronous, messages)

    def _make_backend(self, asynchronous: bool) -> Any:
        shared: dict[str, Any] = {
            "system_prompt": self.system_prompt,
            "max_iterations": self.max_iterations,
            "depth": self.depth,
            "env_max_iterations_multiplier": self.env_max_iterations_multiplier,
        }
        if self.backend_factory is not None:
            return self.backend_factory(self.llm_chat_fn, max_depth=self.max_depth, **shared)
        limits = BackendLimits(
            max_depth=self.max_depth,
            max_batch_workers=self.max_batch_workers,
            max_children_total=self.max_children_total,
            max_children_per_batch=self.max_children_per_batch,
            result_truncation_limit=self.result_truncation_limit,
            per_child_timeout_s=self.per_child_timeout_s,
        )
        kind = AsyncChildRLMBackend if asynchronous else LocalChildRLMBackend
        kind = getattr(self.llm_chat_fn, "backend_kind", kind)
        return kind(
            self.llm_chat_fn,
            runner_factory=self._child_factory,
            limits=limits,
            on_subcall_start=self.on_subcall_start,
            on_subcall_complete=self.on_subcall_complete,
            strict=self.strict,
            **shared,
        )

    def _child_factory(self, llm_chat_fn: ChatFn, **kwargs: Any) -> LocalRLMRunner:
        """A child of the same class and with the same settings that a factory's arguments do not carry."""
        return type(self)(
            llm_chat_fn,
            strict=self.strict,
            sandbox_limits=self.sandbox_limits,
            quote_task_every_turn=self.quote_task_every_turn,
            verbose=self.verbose,
            **kwargs,
        )

    def _first_messages(self, context: str, task: str) -> list[dict[str, str]]:
        about = QueryMetadata([len(context)], len(context), "str")
        return [*build_rlm_system_prompt(self.system_prompt, about), build_user_prompt(task, 0)]

    # The turns

    async def _to_answer(self, run: _Run, context: str) -> RLMRunResult:
        try:
            if run.asynchronous:
                await run.env.areset(context=context, task_prompt=run.task)
            else:
                run.env.reset(context=context, task_prompt=run.task)
            for iteration in range(1, self.max_iterations + 1):
                if await self._turn(run, iteration):
                    return self._result(run, run.env.state.final_answer)
            return self._result(run, run.env.state.final_answer or await self._last_chance(run))
        except DeadlineExceeded:
            return self._timed_out(run)
        except TokenBudgetExceeded as error:
            return self._result(run, f"Error: {error}")
        except BaseException as error:
            run.node.finish(error=str(error) or type(error).__name__)
            raise

    async def _turn(self, run: _Run, iteration: int) -> bool:
        """One reply of the model and the blocks in it; whether the run is finished."""
        if run.deadline.passed:
            raise DeadlineExceeded
        reply = await self._chat(run, run.messages)
        self._report(f"depth {self.depth}, iteration {iteration}/{self.max_iterations}: {preview(reply)!r}")
        blocks = extract_code_blocks(reply)
        run.messages.append({"role": "assistant", "content": reply})
        if not blocks:
            finished = await self._final_in_prose(run, reply)
            if not finished:
                run.messages.append({"role": "user", "content": NO_CODE_NUDGE})
        else:
            observations = [await self._execute(run, code) for code in blocks]
            finished = any(observation.done for observation in observations)
            if not finished:
                run.messages.append(self._next_turn(run, observations, blocks, iteration))
        run.iterations = run.node.iterations = iteration
        return finished

    async def _execute(self, run: _Run, code: str) -> REPLObservation:
        action = REPLAction(code=code)
        return await run.env.astep(action) if run.asynchronous else run.env.step(action)

    def _next_turn(
        self, run: _Run, observations: list[REPLObservation], blocks: list[str], iteration: int
    ) -> dict[str, str]:
        shown = format_observations(observations, code_blocks=blocks)
        task = run.task if self.quote_task_every_turn else None
        return {"role": "user", "content": f"{shown}\n\n{build_user_prompt(task, iteration)['content']}"}

    async def _final_in_prose(self, run: _Run, reply: str) -> bool:
        """Take a `FINAL(...)` that stands alone on its lines in a reply without code."""
        if self.strict:
            return False
        marker = find_marker(reply, ContextGuard(run.env.state.context or ""))
        answer = await run.env.resolve(marker) if marker is not None else None
        if answer is None:
            return False
        run.env.state.final_answer = answer.strip()
        return True

    async def _last_chance(self, run: _Run) -> str | None:
        """Ask once more for the answer; None when there is none to be had."""
        try:
            reply = await self._chat(run, [*run.messages, {"role": "user", "content": LAST_CHANCE}])
            marker = find_in_reply(reply)
        except (DeadlineExceeded, TokenBudgetExceeded):
            raise
        except Exception as error:
            self._report(f"depth {self.depth}: the last call failed: {error}")
            return None
        answer = await run.env.resolve(marker) if marker is not None else None
        return (reply if answer is None else answer).strip() or None

    async def _chat(self, run: _Run, messages: list[dict[str, str]]) -> str:
        chat = getattr(run.backend, "turn", self._chat_fn)
        if run.asynchronous:
            answer = await call_off_loop(chat, messages, run.model)
        else:
            answer = await settle(call_within(run.deadline, chat, messages, run.model))
        run.node.count(answer)
        return answer

    # The end

    def _result(self, run: _Run, answer: str | None) -> RLMRunResult:
        run.node.finish(answer)
        traces = list(run.backend.child_traces)
        return RLMRunResult(answer, run.messages, run.iterations, self.depth, traces, run.node)

    def _timed_out(self, run: _Run) -> RLMRunResult:
        elapsed = time.perf_counter() - run.started
        return self._result(run, f"Error: child timeout after {elapsed:.3f}s")

    def _report(self, line: str) -> None:
        if self.verbose:
            print(line, file=sys.stderr)
