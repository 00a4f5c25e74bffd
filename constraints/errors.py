"""The one error of this package."""

from __future__ import annotations


class ConstraintError(ValueError):
    """A constraint cannot be built, or was given a token that it does not allow.

    The message says what is wrong, where, and what to do about it.
    """
