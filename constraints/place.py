"""Places: points that many texts reach, and the tokens that lead from one to the next.

Whoever walks many sequences through the same places asks a constraint about each place and each step
once. From then on a look-up in `onward` takes the token and tells where it leads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from constraints.vocabulary import Vocabulary

MAX_LINKS = 20_000
"""Remembered (place, token) pairs of one machine or grammar."""
MAX_PLACES = 20_000


class Place:
    """A point that decides by itself what may follow, and what then.

    Attributes:
        state: what the constraint calls it, for `Constraint.move`.
        onward: token → the place it leads to, for tokens after which neither the end nor a token is forced.
        key: the mask's, once somebody has put it here; until then an object of its own.
        slot: where a table keeps the mask; true only if the table has `key` there.
    """

    __slots__ = ("_places", "_variant", "key", "onward", "slot", "state")

    def __init__(self, places: Places, state: Hashable, variant: Hashable):
        self._places = places
        self._variant = variant
        self.state = state
        self.onward: Any = {}
        self.key: Hashable = object()
        self.slot = 0

    def link(self, token: int, after: Place) -> None:
        """Remember where `token` leads, after which there is a choice."""
        self._places.make_room()
        self.onward[token] = after

    def find(self, token: int) -> Place | None:
        """Where `token` leads, if that can be found out without the constraint; remembered in `onward`."""
        places = self._places
        state = None if places.find is None else places.find(self.state, token)
        if state is None:
            return None
        after = places.at(state, self._variant)
        self.link(token, after)
        return after


class Places:
    """The places of one machine or grammar, bounded: when there are too many, all are forgotten.

    `find` tells the state after a state and a token, None when it does not know, when the token may not
    follow, and when the end or a token is forced then.
    """

    def __init__(self, find: Callable[[Any, int], Hashable | None] | None = None) -> None:
        self.find = find
        self._known: dict[tuple[Hashable, Hashable], Place] = {}
        self._num_links = 0

    def at(self, state: Hashable, variant: Hashable = None) -> Place:
        """The place called `state`. A variant is for who has a mask of its own there."""
        known = self._known.get((state, variant))
        if known is None:
            if len(self._known) >= MAX_PLACES:
                self.clear()
            known = self._known[state, variant] = Place(self, state, variant)
        return known

    def make_room(self) -> None:
        """Count a step that is about to be remembered."""
        self._num_links += 1
        if self._num_links > MAX_LINKS:
            self.forget()

    def forget(self) -> None:
        """Drop every step. Who stands at a place stands well, and finds the way anew."""
        # Another thread may add a place meanwhile.
        for place in tuple(self._known.values()):
            place.onward.clear()
        self._num_links = 1

    def clear(self) -> None:
        """Drop every place too."""
        self.forget()
        self._known.clear()


class Everywhere(Place):
    """The place that every text token leads back to."""

    __slots__ = ()

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(Places(), None, None)
        self.onward = _Back(self, vocabulary)

    def link(self, token: int, after: Place) -> None:
        return None


class _Back:
    """Stands for a dictionary that leads from every text token to one place."""

    __slots__ = ("_place", "_texts")

    def __init__(self, place: Place, vocabulary: Vocabulary):
        self._place = place
        self._texts = vocabulary.texts

    def get(self, token: int) -> Place | None:
        # No end has a text.
        return self._place if self._texts[token] else None
