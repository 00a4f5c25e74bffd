"""A REPL environment in this process, with results wrapped as step results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .environment import REPLEnvironment
from .models import REPLAction, REPLObservation, REPLState, StepResult
from .rubrics import REPLRubric
from .sandbox import SandboxLimits


class LocalREPLEnv:
    """An environment for tests, experiments and training loops; use it as a context manager."""

    def __init__(
        self,
        *,
        llm_query_fn: Callable[..., Any] | None = None,
        llm_batch_fn: Callable[..., Any] | None = None,
        subcall_fn: Callable[..., Any] | None = None,
        subcall_batch_fn: Callable[..., Any] | None = None,
        max_output_length: int = 8192,
        context_preview_length: int = 500,
        rubric: REPLRubric | None = None,
        rlm_max_depth: int = 1,
        rlm_max_iterations: int | None = None,
        strict: bool = False,
        sandbox_limits: SandboxLimits | None = None,
    ) -> None:
        self._env = REPLEnvironment(
            max_output_length=max_output_length,
            context_preview_length=context_preview_length,
            rubric=rubric,
            llm_query_fn=llm_query_fn,
            llm_batch_fn=llm_batch_fn,
            subcall_fn=subcall_fn,
            subcall_batch_fn=subcall_batch_fn,
            rlm_max_depth=rlm_max_depth,
            rlm_max_iterations=rlm_max_iterations,
            strict=strict,
            sandbox_limits=sandbox_limits,
        )

    def reset(
        self,
        *,
        context: str = "",
        task_prompt: str = "",
        max_iterations: int = 30,
        seed: int | None = None,
        episode_id: str | None = None,
        hf_token: str | None = None,
        llm_model: str | None = None,
        expected_answer: str | None = None,
        rlm_max_depth: int | None = None,
        rlm_max_iterations: int | None = None,
    ) -> StepResult[REPLObservation]:
        """Begin an episode."""
        self._env.max_iterations = max_iterations
        observation = self._env.reset(
            seed=seed,
            episode_id=episode_id,
            context=context,
            task_prompt=task_prompt,
            hf_token=hf_token,
            llm_model=llm_model,
            expected_answer=expected_answer,
            rlm_max_depth=rlm_max_depth,
            rlm_max_iterations=rlm_max_iterations,
        )
        return _wrapped(observation)

    def step(self, action: REPLAction) -> StepResult[REPLObservation]:
        return _wrapped(self._env.step(action))

    def execute(self, code: str) -> StepResult[REPLObservation]:
        """Run one block."""
        return self.step(REPLAction(code=code))

    def submit_final_answer(self, answer: str) -> StepResult[REPLObservation]:
        """End the episode with `answer`."""
        return self.step(REPLAction(code="", is_final=True, final_answer=answer))

    def get_variable(self, name: str) -> StepResult[REPLObservation]:
        """Print the `repr` of a variable; this is a step like any other."""
        return self.execute(f"print(repr({name}))")

    def state(self) -> REPLState:
        return self._env.state

    def list_variables(self) -> list[str]:
        return self.state().namespace_keys

    def close(self) -> None:
        self._env.close()

    def __enter__(self) -> LocalREPLEnv:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _wrapped(observation: REPLObservation) -> StepResult[REPLObservation]:
    return StepResult(observation=observation, reward=observation.reward, done=observation.done)
