"""What a controller may use; set by the operator, never by a request."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one request. The defaults are upstream AICI's where it has the limit.

    Times are seconds of script time: waiting for the model is free. Sizes are bytes.
    """

    init_seconds: float = 1.0
    step_seconds: float = 0.025
    late_steps: int = 10
    """How many `step_seconds` in a row a step may overrun before the branch fails."""
    branches: int = 16
    """Branches of one request that may live at the same time."""
    branches_made: int = 256
    """Branches of one request over its whole life, those that have ended or failed in their fork too."""
    checkpoints: int = 256
    """Ended branches that the engine keeps for later requests, of all requests together."""
    memory: int = 64 << 20
    log_bytes: int = 64 << 10
    """Log kept per step; what is over is dropped, oldest first."""
    source_bytes: int = 1 << 20
    variable_bytes: int = 1 << 20
    """All variables of one request together."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Limits":
        """Limits from an operator's mapping of field names.

        Raises:
            ValueError: a name is not a limit, or a value is not a positive number; only seconds may be
                fractions.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        for name, value in config.items():
            if name not in kinds:
                raise ValueError(f"unknown limit {name!r}; the limits are {', '.join(kinds)}")
            whole = kinds[name] is int
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not value > 0:
                raise ValueError(
                    f"limit {name} must be a positive {'whole ' if whole else ''}number, not {value!r}"
                )
        return cls(**config)
