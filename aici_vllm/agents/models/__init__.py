"""Models as callables: an OpenAI-compatible client, vLLM in this process, and a scripted one."""

from aici_vllm.agents.models.base import PromptSchema, Reply, attach_replies
from aici_vllm.agents.models.openai import AsyncOpenAIModel, OpenAIModel
from aici_vllm.agents.models.scripted import ScriptedCall, ScriptedModel
from aici_vllm.agents.models.vllm import AsyncVLLMModel, VLLMModel

__all__ = [
    "AsyncOpenAIModel",
    "AsyncVLLMModel",
    "OpenAIModel",
    "PromptSchema",
    "Reply",
    "ScriptedCall",
    "ScriptedModel",
    "VLLMModel",
    "attach_replies",
]
