"""Variables: set, append, wait, and the limit on all of them together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.variables import MOST_WRITES, NOTED, Variables

CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "append"]), st.sampled_from(["a", "bb", "ccc"]), st.binary(max_size=8)),
    max_size=20,
)


@given(st.integers(1, 30), CHANGES)
def test_like_a_dictionary_that_refuses_to_grow_over_its_limit(
    limit: int, changes: list[tuple[str, str, bytes]]
) -> None:
    variables, model = Variables(limit), dict[str, bytes]()
    for change, name, value in changes:
        after = {**model, name: (model.get(name, b"") if change == "append" else b"") + value}
        fits = sum(len(n) + len(v) for n, v in after.items()) <= limit
        if fits:
            getattr(variables, change)(name, value)
            model = after
        else:
            with pytest.raises(LimitError, match=f"may hold {limit} bytes together"):
                getattr(variables, change)(name, value)
        assert variables.snapshot() == model
        assert variables.get(name) == model.get(name)


def test_all_values_come_in_the_order_asked_or_not_at_all() -> None:
    variables = Variables(100)
    variables.set("a", b"1")
    assert variables.get_all(("b", "a")) is None
    assert variables.missing(("b", "a", "c")) == ["b", "c"]
    variables.set("b", b"")
    assert variables.get_all(("b", "a", "b")) == [b"", b"1", b""]
    assert variables.get_all(()) == [] and variables.missing(()) == []


def test_a_snapshot_is_a_copy() -> None:
    variables = Variables(100)
    variables.snapshot()["a"] = b"1"
    assert variables.get("a") is None


def test_appends_from_many_threads_all_arrive() -> None:
    variables = Variables(1 << 20)

    def append() -> None:
        for _ in range(300):
            variables.append("v", b"x")

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert variables.get("v") == b"x" * 1200


def test_writes_are_noted_for_who_watches() -> None:
    variables = Variables(100)
    variables.set("before", b"1")
    assert variables.take_writes() == []
    variables.watch()
    variables.set("a", b"1", 2)
    variables.append("a", b"2")
    with pytest.raises(LimitError):
        variables.set("b", b"x" * 101)
    assert variables.take_writes() == [(2, "a", b"1", "Set"), (0, "a", b"2", "Append")]
    assert variables.take_writes() == []


@pytest.mark.parametrize("write", [Variables.set, Variables.append])
def test_writes_between_two_looks_are_bounded(write: Callable[..., None]) -> None:
    variables = Variables(2000)
    for _ in range(MOST_WRITES + 1):
        write(variables, "a", b"")
    variables.watch()
    for _ in range(MOST_WRITES):
        write(variables, "a", b"")
    with pytest.raises(
        LimitError, match="while a client watches, variables may be written 4096 times in a step"
    ):
        write(variables, "a", b"x")
    assert variables.get("a") == b"" and len(variables.take_writes()) == MOST_WRITES
    write(variables, "a", b"x")


def test_bytes_written_between_two_looks_are_bounded() -> None:
    variables = Variables(100)
    variables.watch()
    for _ in range(NOTED):
        variables.set("a", b"x" * 99)
    with pytest.raises(LimitError, match="with 400 bytes in all"):
        variables.set("a", b"")
    assert variables.get("a") == b"x" * 99
    variables.take_writes()
    variables.set("a", b"")
    assert variables.take_writes() == [(0, "a", b"", "Set")]
