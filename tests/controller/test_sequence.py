"""A sequence against a list that is cut and extended; its marks against positions kept by hand."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aici_vllm.controller.sequence import Origin, Sequence

TOKENS = st.lists(st.integers(0, 9), max_size=5)


class SequenceModel(RuleBasedStateMachine):
    """The model is one list of (token, origin) and one dict of positions; `engine` is the engine's copy."""

    @initialize(prompt=TOKENS)
    def begin(self, prompt: list[int]) -> None:
        self.sequence = Sequence(prompt)
        self.model = [(token, "prompt") for token in prompt]
        self.engine = list(prompt)
        self.marks: dict[int, int | None] = {}
        self.counts = {"sampled": 0, "spliced": 0}

    def add(self, tokens: list[int], origin: str) -> None:
        self.model += [(token, origin) for token in tokens]
        self.counts[origin] += len(tokens)

    @precondition(lambda self: self.engine == [token for token, _ in self.model])
    @rule(token=st.integers(0, 9))
    def sample(self, token: int) -> None:
        self.sequence.add_sampled(token)
        self.add([token], "sampled")
        self.engine.append(token)

    @rule(share=st.floats(0, 1), tokens=TOKENS)
    def splice(self, share: float, tokens: list[int]) -> None:
        position = round(share * len(self.model))
        self.sequence.splice(position, tokens)
        del self.model[position:]
        self.add(tokens, "spliced")
        for mark, at in self.marks.items():
            if at is not None and at > position:
                self.marks[mark] = None

    @rule()
    def mark(self) -> None:
        position = len(self.model)
        mark = self.sequence.mark(position)
        assert mark not in self.marks
        self.marks[mark] = position

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        mark = data.draw(st.sampled_from(sorted(self.marks)))
        self.sequence.release(mark)
        self.marks[mark] = None

    @rule()
    def carry_out(self) -> None:
        """The engine keeps `kept` tokens of its own and takes the rest."""
        self.engine[self.sequence.kept :] = self.sequence.tokens[self.sequence.kept :]
        self.sequence.kept = len(self.sequence)
        assert self.engine == [token for token, _ in self.model]

    @rule()
    def go_on_with_a_copy(self) -> None:
        original = self.sequence
        self.sequence = original.copy()
        self.counts = {"sampled": 0, "spliced": 0}
        original.splice(0, [1, 2, 3])
        original.mark(3)

    @invariant()
    def is_the_model(self) -> None:
        sequence, origins = self.sequence, [origin for _, origin in self.model]
        assert sequence.tokens == [token for token, _ in self.model] and len(sequence) == len(self.model)
        assert [Origin(origin).name.lower() for origin in sequence.origins] == origins
        assert sequence.prompt_len == origins.count("prompt")
        runs = [(origin, len(list(run))) for origin, run in groupby(origins) if origin != "prompt"]
        assert sequence.sources() == runs
        assert (sequence.sampled, sequence.spliced) == (self.counts["sampled"], self.counts["spliced"])
        assert sequence.tokens[: sequence.kept] == self.engine[: sequence.kept]

    @invariant()
    def marks_stand_or_are_gone(self) -> None:
        for mark, at in self.marks.items():
            if at is None:
                with pytest.raises(ValueError, match="this label is gone"):
                    self.sequence.position(mark)
            else:
                assert self.sequence.position(mark) == at
        alive = [at for at in self.marks.values() if at is not None]
        assert self.sequence.settled() == min([*alive, len(self.model)])


TestSequenceModel = SequenceModel.TestCase
TestSequenceModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_mark_at_the_cut_lives_and_one_after_it_dies() -> None:
    sequence = Sequence([1])
    sequence.splice(1, [2, 3])
    before, at, after = sequence.mark(0), sequence.mark(1), sequence.mark(2)
    sequence.splice(1, [4, 5])
    assert (sequence.position(before), sequence.position(at)) == (0, 1)
    with pytest.raises(ValueError, match="backtracked over"):
        sequence.position(after)


def test_the_prompt_can_be_taken_back_and_does_not_come_back() -> None:
    sequence = Sequence([1, 2, 3])
    sequence.splice(1, [2, 3])
    assert sequence.tokens == [1, 2, 3] and sequence.prompt_len == 1
    assert sequence.sources() == [("spliced", 2)] and sequence.kept == 1


def test_kept_never_grows_by_a_splice() -> None:
    sequence = Sequence([1, 2, 3])
    sequence.splice(2, [9])
    sequence.splice(3, [8, 8])
    assert sequence.kept == 2


def test_nobody_is_told_of_changes_that_nobody_watches() -> None:
    sequence = Sequence([1])
    sequence.add_sampled(2)
    assert sequence.take_changes() == []


def test_a_watcher_is_told_every_change_once_and_in_order() -> None:
    sequence = Sequence([1, 2])
    sequence.splice(2, [3])
    sequence.watch()
    sequence.add_sampled(4)
    sequence.add_sampled(5)
    sequence.splice(3, [6])
    assert sequence.take_changes() == [
        ("spliced", [3]),
        ("sampled", [4, 5]),
        ("taken_back", [4, 5]),
        ("spliced", [6]),
    ]
    sequence.splice(0, [])
    assert sequence.take_changes() == [("taken_back", [1, 2, 3, 6])]
    assert sequence.take_changes() == []


def test_a_copy_of_a_watched_sequence_tells_its_text_from_the_start() -> None:
    sequence = Sequence([1])
    sequence.watch()
    sequence.splice(1, [2, 3])
    sequence.add_sampled(4)
    sequence.take_changes()
    copy = sequence.copy()
    sequence.add_sampled(5)
    assert copy.take_changes() == [("spliced", [2, 3]), ("sampled", [4])]
    assert sequence.take_changes() == [("sampled", [5])]
