"""A branch's log keeps the newest text, within a size per step and in all."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.controller.log import STEPS_KEPT, Log


def log_of(step_bytes: int, *steps: list[str]) -> Log:
    log = Log(step_bytes)
    for writes in steps:
        for text in writes:
            log.write(text)
        log.end_step()
    return log


def newest(text: str, size: int) -> str:
    """The longest end of `text` whose UTF-8 has at most `size` bytes."""
    for start in range(len(text) + 1):
        if len(text[start:].encode()) <= size:
            return text[start:]
    raise AssertionError


TEXT = st.text(st.sampled_from("ab\néß日本🎈"), max_size=12)


@given(st.integers(1, 20), st.lists(st.lists(TEXT, max_size=6), max_size=6))
def test_each_step_keeps_its_newest_text(step_bytes: int, steps: list[list[str]]) -> None:
    kept = "".join(newest("".join(writes), step_bytes) for writes in steps)
    assert str(log_of(step_bytes, *steps)) == kept


@given(st.integers(1, 20), st.lists(TEXT, max_size=6))
def test_an_open_step_reads_the_same_as_an_ended_one(step_bytes: int, writes: list[str]) -> None:
    log = Log(step_bytes)
    for text in writes:
        log.write(text)
    assert str(log) == str(log_of(step_bytes, writes))


def test_one_long_line_survives_its_own_newline() -> None:
    assert str(log_of(8, ["0123456789", "\n"])) == "3456789\n"


def test_over_all_steps_the_oldest_go_first() -> None:
    steps = [[f"{number:04}"] for number in range(2 * STEPS_KEPT)]
    assert str(log_of(4, *steps)) == "".join(step[0] for step in steps[STEPS_KEPT:])


def test_steps_without_text_cost_nothing() -> None:
    log = log_of(4, ["abcd"], *[[] for _ in range(10 * STEPS_KEPT)], ["efgh"])
    assert str(log) == "abcdefgh"


def test_what_utf8_cannot_hold_can_still_be_sent() -> None:
    assert str(log_of(10, ["a\ud800b"])).encode() == b"a?b"


def test_threads_write_whole_texts() -> None:
    log = Log(1 << 20)
    words = [f"<{name}>" for name in "abcd"]

    def write(word: str) -> None:
        for _ in range(500):
            log.write(word)

    threads = [threading.Thread(target=write, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(log).count(word) for word in words] == [500] * 4 and len(str(log)) == 6000


def test_new_text_is_taken_once_and_only_of_steps_that_ended() -> None:
    log = Log(100)
    log.write("one\n")
    assert log.take_new() == ""
    log.end_step()
    log.write("two\n")
    log.end_step()
    assert log.take_new() == "one\ntwo\n"
    log.write("three\n")
    log.end_step()
    assert log.take_new() == "three\n"
    assert log.take_new() == ""
    assert str(log) == "one\ntwo\nthree\n"
