"""Recursive language models: a long context is worked on by code and by model calls on its pieces."""

from .async_backends import AsyncChildRLMBackend
from .backends import (
    BackendLimits,
    ChildTrace,
    DirectLMBackend,
    LocalChildRLMBackend,
    RecursiveBackend,
)
from .budget import TokenBudget, TokenBudgetExceeded
from .calltree import CallNode
from .chat import ChatFn, Reply, Usage
from .controller import RecursiveController, create_server_recursive_controller
from .environment import REPLEnvironment
from .in_engine import EngineBackend, EngineCallError, EngineChat, ServerEngine
from .local import LocalREPLEnv
from .models import (
    CodeBlockResult,
    EnvironmentMetadata,
    REPLAction,
    REPLObservation,
    REPLState,
    StepResult,
)
from .prompts import (
    RLM_SYSTEM_PROMPT,
    RLM_SYSTEM_PROMPT_ENGINE,
    RLM_SYSTEM_PROMPT_QWEN,
    QueryMetadata,
    build_initial_prompt,
    build_rlm_system_prompt,
    build_user_prompt,
    extract_code_blocks,
    format_observation,
    format_observations,
)
from .rubrics import (
    CodeExecutionRubric,
    CustomMetricRubric,
    ExactMatchRubric,
    FuzzyMatchRubric,
    REPLRubric,
    Rubric,
)
from .runner import LocalRLMRunner, RLMRunResult
from .sandbox import Sandbox, SandboxError, SandboxLimits
from .tree_page import tree_page, write_tree_page
from .tree_view import live_tree, render_tree

__all__ = [
    "RLM_SYSTEM_PROMPT",
    "RLM_SYSTEM_PROMPT_ENGINE",
    "RLM_SYSTEM_PROMPT_QWEN",
    "AsyncChildRLMBackend",
    "BackendLimits",
    "CallNode",
    "ChatFn",
    "ChildTrace",
    "CodeBlockResult",
    "CodeExecutionRubric",
    "CustomMetricRubric",
    "DirectLMBackend",
    "EngineBackend",
    "EngineCallError",
    "EngineChat",
    "EnvironmentMetadata",
    "ExactMatchRubric",
    "FuzzyMatchRubric",
    "LocalChildRLMBackend",
    "LocalREPLEnv",
    "LocalRLMRunner",
    "QueryMetadata",
    "REPLAction",
    "REPLEnvironment",
    "REPLObservation",
    "REPLRubric",
    "REPLState",
    "RLMRunResult",
    "RecursiveBackend",
    "RecursiveController",
    "Reply",
    "Rubric",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "ServerEngine",
    "StepResult",
    "TokenBudget",
    "TokenBudgetExceeded",
    "Usage",
    "build_initial_prompt",
    "build_rlm_system_prompt",
    "build_user_prompt",
    "create_server_recursive_controller",
    "extract_code_blocks",
    "format_observation",
    "format_observations",
    "live_tree",
    "render_tree",
    "tree_page",
    "write_tree_page",
]
