"""`Constraint`: which tokens may come next. The base class allows any text and is made to be subclassed."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

from constraints.errors import ConstraintError
from constraints.masks import masks
from constraints.place import Everywhere, Place
from constraints.token_set import Row, TokenSet, freeze
from constraints.vocabulary import Vocabulary


class Constraint:
    """Any text: the end is always allowed and never forced; special tokens are never allowed.

    A subclass overrides `eos_allowed`, `token_allowed`, `append_token` and, where it matters for speed,
    `allow_tokens`; everything else follows from them. `vocabulary` must be set before tokens are asked for,
    by the constructor or by whoever runs the constraint.
    """

    vocabulary: Vocabulary | None = None

    def __init__(self, vocabulary: Vocabulary | None = None):
        if vocabulary is not None:
            self.vocabulary = vocabulary

    def known_vocabulary(self) -> Vocabulary:
        """The vocabulary. `ConstraintError` when none was set."""
        if self.vocabulary is None:
            raise ConstraintError(f"{type(self).__name__} has no vocabulary; set its `vocabulary` first")
        return self.vocabulary

    def eos_allowed(self) -> bool:
        """Whether the text may end here."""
        return True

    def eos_forced(self) -> bool:
        """Whether the text must end here: it may, and no byte can follow."""
        return False

    def token_allowed(self, token: int) -> bool:
        """Whether `token` may come next. For an end-of-sequence id: whether the text may end."""
        v = self.known_vocabulary()
        if not 0 <= token < v.size:
            return False
        return self.eos_allowed() if token in v.eos_token_ids else bool(v.token_bytes(token))

    def allow_tokens(self, allowed: TokenSet) -> None:
        """Make `allowed` the set of tokens that may come next; what was in it is cleared."""
        v = self.known_vocabulary()
        if type(self).token_allowed is Constraint.token_allowed:
            allowed.row[:] = v.text_tokens.row
        else:
            # A subclass that answers only token by token can only be asked token by token.
            texts = (int(token) for token in v.text_tokens.ids())
            allowed.row[:] = TokenSet.of((t for t in texts if self.token_allowed(t)), v.size).row
        if self.eos_allowed():
            allowed.row |= v.eos_row

    def append_token(self, token: int) -> None:
        """Take `token`. An end-of-sequence id changes nothing. `ConstraintError` when it is not allowed."""
        v = self.known_vocabulary()
        if token not in v.eos_token_ids and not self.token_allowed(token):
            raise self._refusal(token)

    def _refusal(self, token: int) -> ConstraintError:
        v = self.known_vocabulary()
        return ConstraintError(
            f"token {token} ({v.token_repr(token)}) is not allowed here; append only tokens in the mask"
        )

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, as the model's tokenizer writes them; [] when there is a choice."""
        return []

    def has_choice(self) -> bool:
        """Whether neither the end nor a token is forced here, as far as that is known at no cost.

        False promises nothing: `eos_forced` and `forced_tokens` tell.
        """
        return False

    def place(self, variant: Hashable = None) -> Place | None:
        """Where the constraint stands, if many texts get there and nothing else decides what may follow.

        A variant is a mask that the caller makes of the constraint's own.

        Whoever follows `Place.onward` from there need not tell the constraint of each token, if `move`
        tells it of all of them before it is asked anything again.
        """
        return None

    def move(self, tokens: list[int], state: Any) -> None:
        """Take `tokens`, which lead to the place of that `state`."""
        for token in tokens:
            self.append_token(token)

    def state_key(self) -> Hashable | None:
        """Constraints with equal keys have equal masks; `None` says that the mask cannot be shared."""
        return None

    def mask_row(self) -> Row:
        """The mask: int32[num_words], bit t set when token t may come next. Read-only.

        It is all zero at a dead end.
        """
        key = self.state_key()
        if key is not None and (known := masks.get(key)) is not None:
            return known
        row = freeze(self._make_row())
        return row if key is None else masks.put(key, row)

    def _make_row(self) -> Row:
        v = self.known_vocabulary()
        allowed = TokenSet(v.size, v)
        self.allow_tokens(allowed)
        return allowed.row

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens. `ConstraintError` when fewer were appended."""
        if type(self) is not Constraint and type(self).append_token is not Constraint.append_token:
            raise ConstraintError(f"{type(self).__name__} does not define rollback")

    def fork(self) -> Constraint:
        """An independent constraint in the same state. A subclass with state is copied deeply."""
        return copy.deepcopy(self, {id(self.vocabulary): self.vocabulary})

    def __deepcopy__(self, memo: dict[int, Any]) -> Constraint:
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            twin.__dict__[name] = value if name == "vocabulary" else copy.deepcopy(value, memo)
        return twin


class AnyText(Constraint):
    """Any text, sharing one mask."""

    def place(self, variant: Hashable = None) -> Place | None:
        return Everywhere(self.known_vocabulary()) if type(self) is AnyText else None

    def move(self, tokens: list[int], state: Any) -> None:
        return None

    def has_choice(self) -> bool:
        return True

    def state_key(self) -> Hashable:
        return ("any text", self.known_vocabulary().key)

    def rollback(self, count: int) -> None:
        return None

    def fork(self) -> AnyText:
        return AnyText(self.vocabulary)
