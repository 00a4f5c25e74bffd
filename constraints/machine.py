"""A constraint whose positions are the states of a machine that all its sequences share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from constraints.constraint import Constraint
from constraints.errors import ConstraintError
from constraints.forced import CONTEXT, canonical_run, is_left_open
from constraints.masks import masks, owners
from constraints.place import Place, Places
from constraints.token_set import Row, TokenSet, freeze
from constraints.vocabulary import Vocabulary

State = TypeVar("State", bound=Hashable)

MAX_STEPS = 20_000
"""Remembered (state, token) pairs, next bytes and forced runs of one machine, each."""
MAX_STATES = 20_000
"""States of one machine, after which the next sequence starts on a fresh one. A state takes some 3 KB."""
MAX_ALL_STATES = 60_000
"""States of all machines that are kept for the next sequences."""
MAX_RUN = 4096
"""Bytes of one forced run."""
MAX_MACHINES = 256
COUNTED_EVERY = 8
"""Compilations between two counts of all states: a count takes some 20 µs."""


@dataclass(frozen=True)
class Stretch(Generic[State]):
    """Bytes that are forced one after another, and the state after them."""

    text: bytes
    after: State


class Machine(ABC, Generic[State]):
    """States, and the tokens that lead from one to another, shared by all sequences.

    A subclass says what bytes do; tokens, caches and forced runs follow. The engine's thread and those that
    answer scripts use one machine at once: what it remembers is looked up without a lock, and what makes more
    than one entry takes one.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.number = next(owners)
        self.steps: dict[State, dict[int, State]] = {}
        """The states that tokens are known to lead to."""
        self._num_steps = 0
        self.choices: dict[State, bool] = {}
        """Whether neither the end nor a token is forced in a state, where that was asked."""
        self._following: dict[State, bytes] = {}
        self._runs: dict[Hashable, list[int]] = {}
        self._stretches: dict[State, tuple[Stretch[State], int]] = {}
        """The forced bytes that somebody walked through a state, and how many of them came before it."""
        self.places: Places | None = Places(self._onward)
        """The places of its states; None where what a state means may change while sequences stand there."""

    @property
    @abstractmethod
    def start(self) -> State:
        """The state before any text."""

    @abstractmethod
    def step(self, state: State, text: bytes) -> State | None:
        """The state after `text`, None when it is not allowed."""

    @abstractmethod
    def accepts(self, state: State) -> bool:
        """Whether the text may end in `state`."""

    @abstractmethod
    def next_bytes(self, state: State) -> bytes:
        """Every byte that may follow, ascending."""

    @abstractmethod
    def text_row(self, state: State, tokens: list[int]) -> Row:
        """The mask of the text tokens that may follow `state`, which `tokens` led to. Writable."""

    def state_key(self, state: State) -> Hashable:
        """What the mask of `state` depends on, inside this machine."""
        return state

    def advance(self, state: State, token: int) -> State | None:
        """The state after `token`, None when it is not allowed."""
        onward = self.steps.get(state)
        if onward is not None and (known := onward.get(token)) is not None:
            return known
        text = self.vocabulary.texts[token] if 0 <= token < self.vocabulary.size else b""
        found = self.step(state, text) if text else None
        if found is None:
            return None
        if self._num_steps >= MAX_STEPS:
            self.steps.clear()
            self._num_steps, onward = 0, None
        if onward is None:
            onward = self.steps[state] = {}
        self._num_steps += 1
        onward[token] = found
        return found

    def _onward(self, state: State, token: int) -> State | None:
        """The state after `token`, if the token is allowed and leaves a choice."""
        text = self.vocabulary.texts[token] if token < self.vocabulary.size else b""
        try:
            found = self.step(state, text) if text else None
            return found if found is not None and self.has_choice(found) else None
        except ConstraintError:
            # It is raised again where the sequence itself takes the token.
            return None

    def following(self, state: State) -> bytes:
        """As `next_bytes`, remembered."""
        known = self._following.get(state)
        if known is None:
            if len(self._following) >= MAX_STEPS:
                self._following.clear()
            known = self._following[state] = self.next_bytes(state)
        return known

    def has_choice(self, state: State) -> bool:
        """Whether neither the end nor a token is forced in `state`, whatever led to it. Remembered."""
        known = self.choices.get(state)
        if known is None:
            if len(self.choices) >= MAX_STEPS:
                self.choices.clear()
            known = self.choices[state] = self._has_choice(state)
        return known

    def _has_choice(self, state: State) -> bool:
        follow = self.following(state)
        if len(follow) == 1 and not self.accepts(state):
            return is_left_open(self.vocabulary, *self.forced_bytes(state))
        return bool(follow)

    def num_states(self) -> int:
        """How many states it remembers: its memory."""
        return 0

    def forget(self) -> None:
        """Drop what is remembered of states and tokens, because it changed."""
        self.steps.clear()
        self.choices.clear()
        self._following.clear()
        self._runs.clear()
        self._stretches.clear()

    def forced_run(self, state: State, tokens: list[int]) -> list[int]:
        """The tokens that must follow `state`, which `tokens` led to."""
        if self.has_choice(state) or len(self.following(state)) != 1:
            return []
        key = (state, *tokens[-CONTEXT:])
        run = self._runs.get(key)
        if run is None:
            forced, follow = self.forced_bytes(state)
            if len(self._runs) >= MAX_STEPS:
                self._runs.clear()
            run = self._runs[key] = canonical_run(self.vocabulary, tokens[-CONTEXT:], forced, follow)
        return list(run)

    def forced_bytes(self, state: State) -> tuple[bytes, bytes]:
        """The bytes that must follow `state`, and those that may follow them."""
        forced = b""
        while len(forced) < MAX_RUN and (found := self._stretch(state)):
            stretch, begin = found
            forced += stretch.text[begin:]
            state = stretch.after
        if len(forced) > MAX_RUN:
            return forced[:MAX_RUN], forced[MAX_RUN : MAX_RUN + 1]
        return forced, self.following(state)

    def _stretch(self, state: State) -> tuple[Stretch[State], int] | None:
        """Forced bytes through `state`, and how many of them come before it; None when it forces none.

        A run is asked for at each of its tokens, so its bytes are walked once and remembered for all states.
        """
        known = self._stretches.get(state)
        if known is not None:
            return known
        text, passed, at = bytearray(), [], state
        while len(text) < MAX_RUN:
            follow = self.following(at)
            if len(follow) != 1 or self.accepts(at) or (after := self.step(at, follow)) is None:
                break
            passed.append(at)
            text += follow
            at = after
        if not text:
            return None
        if len(self._stretches) >= MAX_STEPS:
            self._stretches.clear()
        stretch = Stretch(bytes(text), at)
        self._stretches.update((there, (stretch, place)) for place, there in enumerate(passed))
        return stretch, 0


class MachineConstraint(Constraint, Generic[State]):
    """A position in a machine. `fork` costs nothing but the list of tokens, `rollback` little more."""

    vocabulary: Vocabulary

    def __init__(self, machine: Machine[State]):
        super().__init__(machine.vocabulary)
        self.move_to(machine)
        self._state = machine.start
        self._tokens: list[int] = []
        # Before each token, as far as somebody asked: the rest is found again from the tokens.
        self._states: list[State] = [machine.start]

    def eos_allowed(self) -> bool:
        return self.machine.accepts(self._state)

    def eos_forced(self) -> bool:
        return not self.machine.following(self._state) and self.machine.accepts(self._state)

    def token_allowed(self, token: int) -> bool:
        if token in self.vocabulary.eos_token_ids:
            return self.eos_allowed()
        return self.machine.advance(self._state, token) is not None

    def allow_tokens(self, allowed: TokenSet) -> None:
        allowed.row[:] = self.mask_row()

    def append_token(self, token: int) -> None:
        onward = self._steps.get(self._state)
        after = None if onward is None else onward.get(token)
        if after is None:
            after = self._state if token in self.vocabulary.eos_token_ids else self._advance(token)
        self._state = after
        self._tokens.append(token)

    def place(self, variant: Hashable = None) -> Place | None:
        places = self.machine.places
        return None if places is None else places.at(self._state, variant)

    def move(self, tokens: list[int], state: State) -> None:
        self._tokens += tokens
        self._state = state

    def _advance(self, token: int) -> State:
        after = self.machine.advance(self._state, token)
        if after is None:
            raise self._refusal(token)
        return after

    def has_choice(self) -> bool:
        known = self._choices.get(self._state)
        return self.machine.has_choice(self._state) if known is None else known

    def forced_tokens(self) -> list[int]:
        return self.machine.forced_run(self._state, self._tokens)

    def state_key(self) -> Hashable:
        return self.machine.number, self.machine.state_key(self._state)

    def mask_row(self) -> Row:
        key = self.machine.number, self.machine.state_key(self._state)
        known = masks.get(key)
        return masks.put(key, freeze(self._make_row())) if known is None else known

    def _make_row(self) -> Row:
        row = self.machine.text_row(self._state, self._tokens)
        if self.machine.accepts(self._state):
            row |= self.vocabulary.eos_row
        return row

    def rollback(self, count: int) -> None:
        if not 0 <= count <= len(self._tokens):
            raise ConstraintError(f"cannot take back {count} of {len(self._tokens)} tokens")
        if not count:
            return
        kept, states = len(self._tokens) - count, self._states
        for token in self._tokens[len(states) - 1 : kept]:
            self._state = states[-1]
            states.append(states[-1] if token in self.vocabulary.eos_token_ids else self._advance(token))
        del self._tokens[kept:], states[kept + 1 :]
        self._state = states[-1]

    def move_to(self, machine: Machine[State]) -> None:
        """Go on in `machine`, whose states mean what those of the present one do."""
        self.machine = machine
        self._steps = machine.steps
        self._choices = machine.choices

    def fork(self) -> MachineConstraint[State]:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._tokens = self._tokens.copy()
        twin._states = self._states.copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> MachineConstraint[State]:
        # Who holds one, such as a constraint of a user's, shares its machine when it is copied.
        return self.fork()


class Sized(Protocol):
    """What is kept after it was compiled."""

    def num_states(self) -> int:
        """How many states it remembers: its memory."""


Made = TypeVar("Made", bound=Sized)


class Compiled:
    """What was compiled lately, by what it was compiled from. Bounded in number and in states."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._made = 0
        self._lock = Lock()

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def num_states(self) -> int:
        """States of all that is kept."""
        return sum(made.num_states() for made in tuple(self._kept.values()))

    def get(self, key: Hashable, compile: Callable[[], Made]) -> Made:
        """What was compiled from `key`, compiled anew when it has grown too large."""
        with self._lock:
            found: Made | None = self._kept.get(key)
            if found is not None and found.num_states() <= MAX_STATES:
                self._kept.move_to_end(key)
                return found
            self._kept.pop(key, None)
        made = compile()
        with self._lock:
            kept: Made = self._kept.setdefault(key, made)
            self._trim()
            return kept

    def _trim(self) -> None:
        while len(self._kept) > MAX_MACHINES:
            self._kept.popitem(last=False)
        self._made += 1
        if self._made % COUNTED_EVERY == 0:
            total = self.num_states()
            while total > MAX_ALL_STATES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].num_states()


compiled = Compiled()
"""Equal sources give one machine, and so share masks."""
