"""Recursive runs inside an engine with this plugin: offline, or through its server.

`program` and `turn_shape` are what the engine runs for one call; everything else stays with the client.
"""

from .backend import EngineBackend
from .chat import EngineChat
from .errors import CheckpointGoneError, EngineCallError, IncompleteAnswerError, PromptTooLongError
from .local_engine import AsyncLLMEngine, LLMEngine
from .server_engine import ServerEngine

__all__ = [
    "AsyncLLMEngine",
    "CheckpointGoneError",
    "EngineBackend",
    "EngineCallError",
    "EngineChat",
    "IncompleteAnswerError",
    "LLMEngine",
    "PromptTooLongError",
    "ServerEngine",
]
