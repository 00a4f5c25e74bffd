"""What can go wrong with a call to the engine."""

from __future__ import annotations


class EngineCallError(RuntimeError):
    """The engine refused a call, or its controller failed."""


class CheckpointGoneError(EngineCallError):
    """The engine has forgotten the branch that a call was to go on from."""


class PromptTooLongError(EngineCallError):
    """The prompt of a call leaves no room for a reply in the model's context; nothing was computed."""


class IncompleteAnswerError(EngineCallError):
    """An answer that had to match a schema or a regular expression was cut short."""
