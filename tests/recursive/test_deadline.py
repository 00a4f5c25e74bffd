"""Deadlines and calls that are left behind."""

import threading

import pytest

from aici_vllm.recursive.deadline import NEVER, Deadline, DeadlineExceeded, call_within


def test_a_deadline_is_never_or_in_the_future_or_passed():
    assert NEVER.remaining is None and not NEVER.passed
    assert 50 < Deadline(60).remaining <= 60 and not Deadline(60).passed
    assert Deadline(0).remaining == 0 and Deadline(0).passed


def test_a_child_gets_the_shorter_of_its_own_limit_and_what_is_left():
    assert NEVER.narrowed(None) is None
    assert NEVER.narrowed(5) == 5
    assert 50 < Deadline(60).narrowed(None) <= 60
    assert 50 < Deadline(60).narrowed(100) <= 60
    assert Deadline(60).narrowed(5) == 5


def test_without_a_deadline_the_call_stays_in_this_thread():
    assert call_within(NEVER, threading.current_thread) is threading.current_thread()


def test_results_and_errors_cross_over():
    assert call_within(Deadline(60), lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(KeyError):
        call_within(Deadline(60), {}.__getitem__, "x")


def test_a_call_that_outlives_the_deadline_is_left_behind():
    release = threading.Event()
    with pytest.raises(DeadlineExceeded):
        call_within(Deadline(0.02), release.wait)
    release.set()


def test_after_the_deadline_nothing_is_started():
    called = []
    with pytest.raises(DeadlineExceeded):
        call_within(Deadline(0), called.append, 1)
    assert called == []
