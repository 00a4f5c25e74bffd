"""Recursive backends: what `llm_query` and `rlm_query` of one REPL are wired to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from .calltree import CallNode, preview
from .chat import ChatFn, with_model
from .deadline import NEVER, Deadline, DeadlineExceeded
from .fanout import Crew

SubcallStart = Callable[[int, str, str], None]
SubcallComplete = Callable[[int, str, float, "str | None"], None]

TOO_MANY_CHILDREN = "Error: max_children_total exceeded"
TOO_MANY_IN_BATCH = "Error: max_children_per_batch exceeded"


class RecursiveBackend(Protocol):
    """What a REPL asks of the model behind it.

    The methods may be coroutine functions where the run is driven with `arun`. Keyword arguments that model
    code passes to `llm_query` and the others arrive here as they are.

    Three attributes are set by the runner where a backend has them: `node`, the node of the call tree that
    its calls belong to; `deadline`, which they must keep; and `messages`, the live conversation of the run.
    A backend with a method `turn(messages, model)` also makes the run's own calls, in place of the chat
    function.
    """

    max_depth: int
    depth: int
    child_traces: list[ChildTrace]

    def query(self, prompt: str, model: str | None = None) -> str: ...

    def query_batched(self, prompts: list[str], model: str | None = None) -> list[str]: ...

    def recursive_query(self, prompt: str, model: str | None = None) -> str: ...

    def recursive_query_batched(self, prompts: list[str], model: str | None = None) -> list[str]: ...


@dataclass
class BackendLimits:
    """Limits of one tree of runs; the whole tree shares one object.

    `max_batch_workers` bounds the threads of all batches of the tree together. `max_children_total` counts
    children ever started, `max_children_per_batch` caps the prompts of one recursive batch,
    `result_truncation_limit` is in characters, `per_child_timeout_s` in seconds.
    """

    max_depth: int = 1
    max_batch_workers: int = 8
    max_children_total: int | None = None
    max_children_per_batch: int | None = None
    result_truncation_limit: int | None = None
    per_child_timeout_s: float | None = None
    _children_spawned: int = field(default=0, init=False, repr=False)
    _children_lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _crew: Crew = field(default_factory=Crew, init=False, repr=False, compare=False)
    _gates: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def admit_child(self) -> bool:
        """Count one more child, or refuse it when the tree has had its share."""
        with self._children_lock:
            if self.max_children_total is not None and self._children_spawned >= self.max_children_total:
                return False
            self._children_spawned += 1
            return True

    def start_episode(self) -> None:
        """Forget the children of earlier episodes."""
        with self._children_lock:
            self._children_spawned = 0


@dataclass
class ChildTrace:
    """What is kept of one child run. `children` are the traces of the child's own children."""

    depth: int
    duration_s: float
    prompt_preview: str
    result_preview: str | None
    error: str | None
    children: list[ChildTrace] = field(default_factory=list)


class DirectLMBackend:
    """Every query is one plain model call; recursive queries are the same."""

    def __init__(
        self,
        llm_chat_fn: ChatFn,
        *,
        depth: int = 0,
        limits: BackendLimits | None = None,
        strict: bool = False,
    ) -> None:
        self.llm_chat_fn = llm_chat_fn
        self.depth = depth
        self.limits = limits or BackendLimits()
        self.max_depth = self.limits.max_depth
        self.strict = strict
        self.child_traces: list[ChildTrace] = []
        self.node: CallNode | None = None
        self.deadline: Deadline = NEVER
        self._chat = with_model(llm_chat_fn)

    def query(self, prompt: str, model: str | None = None) -> str:
        """One model call with `prompt` as its only message."""
        if self.deadline.passed:
            raise DeadlineExceeded("the deadline of this run has passed")
        node = self._node("query", self.depth, prompt, model)
        try:
            answer = self._chat([{"role": "user", "content": prompt}], model)
        except BaseException as error:
            node.finish(error=str(error))
            raise
        return self._answered(node, answer)

    def query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
        """One model call per prompt, in parallel; a failed call gives `Error: ...` in its place."""
        return self._batch(self.query, prompts, model)

    def recursive_query(self, prompt: str, model: str | None = None) -> str:
        return self.query(prompt, model)

    def recursive_query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
        return self.query_batched(prompts, model)

    def _node(self, kind: Any, depth: int, prompt: str, model: str | None) -> CallNode:
        if self.node is None:
            return CallNode(kind, depth, preview(prompt), model)
        return self.node.child(kind, depth, prompt, model)

    def _answered(self, node: CallNode, answer: Any) -> str:
        node.count(answer)
        answer = self._truncate(answer)
        node.finish(answer)
        return answer

    def _truncate(self, answer: str) -> str:
        limit = self.limits.result_truncation_limit
        if limit is not None and len(answer) > limit:
            return answer[:limit]
        return answer

    def _batch(self, query: Callable[..., str], prompts: Sequence[str], model: str | None) -> list[str]:
        def one(prompt: str) -> str:
            try:
                return query(prompt, model)
            except Exception as error:
                return f"Error: {error}"

        return self.limits._crew.map(one, prompts, self.limits.max_batch_workers) if prompts else []


class LocalChildRLMBackend(DirectLMBackend):
    """Recursive queries run a child RLM with a REPL of its own, down to `limits.max_depth`."""

    def __init__(
        self,
        llm_chat_fn: ChatFn,
        *,
        runner_factory: Callable[..., Any],
        system_prompt: str,
        max_iterations: int,
        env_max_iterations_multiplier: int,
        depth: int = 0,
        limits: BackendLimits | None = None,
        on_subcall_start: SubcallStart | None = None,
        on_subcall_complete: SubcallComplete | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(llm_chat_fn, depth=depth, limits=limits, strict=strict)
        self.runner_factory = runner_factory
        self.system_prompt = system_prompt
        self.max_iterations = max_iterations
        self.env_max_iterations_multiplier = env_max_iterations_multiplier
        self.on_subcall_start = on_subcall_start
        self.on_subcall_complete = on_subcall_complete

    def recursive_query(self, prompt: str, model: str | None = None) -> str:
        """Run a child RLM with `prompt` as its context and its task, or one plain call at the depth limit."""
        if self.depth + 1 >= self.max_depth:
            return self.query(prompt, model)
        if not self.limits.admit_child():
            return TOO_MANY_CHILDREN
        with _ChildCall(self, prompt, model) as call:
            child = self._make_child(call)
            result = child.run(prompt, prompt, model=model, timeout_s=call.timeout_s)
            return call.finished(result)

    def recursive_query_batched(self, prompts: list[str], model: str | None = None) -> list[str]:
        """A child RLM per prompt, in parallel; a failed child gives `Error: ...` in its place.

        Over `max_children_per_batch` the list is shortened; with `strict=True` it keeps its length and the
        prompts over the cap get an error string.

        Raises:
            ValueError: `max_children_per_batch` is below 1.
        """
        kept = self._capped(prompts)
        answers = self._batch(self.recursive_query, kept, model)
        return answers + self._refused(prompts, kept)

    def _capped(self, prompts: Sequence[str]) -> Sequence[str]:
        cap = self.limits.max_children_per_batch
        if prompts and cap is not None and cap < 1:
            raise ValueError(f"max_children_per_batch is {cap}; set it to 1 or more, or to None for no cap")
        return prompts if cap is None else prompts[:cap]

    def _refused(self, prompts: Sequence[str], kept: Sequence[str]) -> list[str]:
        return [TOO_MANY_IN_BATCH] * (len(prompts) - len(kept)) if self.strict else []

    def _make_child(self, call: _ChildCall) -> Any:
        child = self.runner_factory(
            self.llm_chat_fn,
            system_prompt=self.system_prompt,
            max_iterations=self.max_iterations,
            max_depth=self.max_depth,
            depth=self.depth + 1,
            env_max_iterations_multiplier=self.env_max_iterations_multiplier,
            max_batch_workers=self.limits.max_batch_workers,
            backend_factory=self._child_backend_factory,
            on_subcall_start=self.on_subcall_start,
            on_subcall_complete=self.on_subcall_complete,
        )
        if hasattr(child, "node"):
            child.node = call.node
        if hasattr(child, "strict"):
            child.strict = self.strict
        return child

    def _child_backend_factory(self, llm_chat_fn: ChatFn, **kwargs: Any) -> LocalChildRLMBackend:
        return type(self)(llm_chat_fn, **self._child_arguments(**kwargs))

    def _child_arguments(self, **kwargs: Any) -> dict[str, Any]:
        """How the backend of a child run is made; `kwargs` are what its runner says of itself."""
        return {
            "runner_factory": self.runner_factory,
            "system_prompt": kwargs["system_prompt"],
            "max_iterations": kwargs["max_iterations"],
            "env_max_iterations_multiplier": kwargs["env_max_iterations_multiplier"],
            "depth": kwargs["depth"],
            "limits": self.limits,
            "on_subcall_start": self.on_subcall_start,
            "on_subcall_complete": self.on_subcall_complete,
            "strict": self.strict,
        }


class _ChildCall:
    """One child run, from its start callback to its trace; a context manager, so that no exit is missed."""

    def __init__(self, backend: LocalChildRLMBackend, prompt: str, model: str | None) -> None:
        self.backend, self.prompt = backend, prompt
        self.depth = backend.depth + 1
        self.model = str(model or "default")
        self.node = backend._node("run", self.depth, prompt, model)
        self.timeout_s = backend.deadline.narrowed(backend.limits.per_child_timeout_s)
        self.answer: str | None = None
        self.nested: list[ChildTrace] = []

    def __enter__(self) -> _ChildCall:
        self.started = time.perf_counter()
        if self.backend.on_subcall_start is not None:
            with suppress(Exception):
                self.backend.on_subcall_start(self.depth, self.model, preview(self.prompt))
        return self

    def finished(self, result: Any) -> str:
        self.nested = list(getattr(result, "child_traces", []))
        self.answer = self.backend._truncate(result.final_answer or "")
        return self.answer

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        duration = time.perf_counter() - self.started
        text = None if error is None else str(error)
        shown = preview(self.answer) if self.answer else None
        self.backend.child_traces.append(
            ChildTrace(self.depth, duration, preview(self.prompt), shown, text, self.nested)
        )
        self.node.finish(self.answer, text)
        if self.backend.on_subcall_complete is not None:
            with suppress(Exception):
                self.backend.on_subcall_complete(self.depth, self.model, duration, text)
