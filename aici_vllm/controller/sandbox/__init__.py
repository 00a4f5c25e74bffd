"""Scripts that arrive as text: run in worker processes that can reach nothing but their branch."""

from aici_vllm.controller.sandbox.pool import SandboxPool
from aici_vllm.controller.sandbox.program import SandboxProgram

__all__ = ["SandboxPool", "SandboxProgram"]
