"""What crosses the environment's boundary: actions, observations and state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class REPLAction(BaseModel):
    """One step: code to run, or an explicit final answer."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    code: str = ""
    is_final: bool = False
    final_answer: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class CodeBlockResult(BaseModel):
    """The outcome of one block. `locals_snapshot` maps new or changed variables to their shortened `repr`."""

    stdout: str = ""
    stderr: str = ""
    locals_snapshot: dict[str, str] = Field(default_factory=dict)
    execution_time: float = Field(default=0.0, ge=0)
    success: bool = True
    exception: str | None = None


class REPLObservation(BaseModel):
    """What a step shows: the block's result and the episode's progress."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    result: CodeBlockResult = Field(default_factory=CodeBlockResult)
    context_preview: str | None = None
    context_length: int = Field(default=0, ge=0)
    available_variables: list[str] = Field(default_factory=list)
    iteration: int = Field(default=0, ge=0)
    max_iterations: int = Field(default=30, ge=1)
    done: bool = False
    reward: bool | int | float | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class REPLState(BaseModel):
    """The state of one episode."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    episode_id: str | None = None
    step_count: int = Field(default=0, ge=0)
    context: str | None = None
    task_prompt: str | None = None
    iteration: int = Field(default=0, ge=0)
    max_iterations: int = Field(default=30, ge=1)
    namespace_keys: list[str] = Field(default_factory=list)
    final_answer: str | None = None
    total_execution_time: float = Field(default=0.0, ge=0)


class EnvironmentMetadata(BaseModel):
    """Name, description and version of an environment."""

    name: str
    description: str
    version: str


ObservationT = TypeVar("ObservationT")


@dataclass
class StepResult(Generic[ObservationT]):
    """An observation with its reward and whether the episode is over."""

    observation: ObservationT
    reward: float | None = None
    done: bool = False
