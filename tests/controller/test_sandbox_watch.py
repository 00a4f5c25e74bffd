"""When a turn's process is killed: it computed too long, stands still, or was starved for too long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox import watch as watch_module
from aici_vllm.controller.sandbox.program import Suspended
from aici_vllm.controller.sandbox.watch import HUNG, STARVED, Watch, patience
from tests.controller.scripts import new_group

LIMITS = Limits(step_seconds=0.01, late_steps=10)
LIMIT = 0.1


class Clock:
    """Stands in for the module `time`, and for the process's own clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.computed = 5.0

    def monotonic(self) -> float:
        return self.now

    def pass_(self, seconds: float, computed: float) -> None:
        self.now += seconds
        self.computed += computed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch_module, "time", clock)
    monkeypatch.setattr(Watch, "_seconds", lambda self: clock.computed)
    monkeypatch.setattr(watch_module.os, "kill", lambda pid, sent: None)
    return clock


@pytest.fixture
def watch(clock: Clock) -> Iterator[Watch]:
    pool = SandboxPool(LIMITS)
    program = pool.program("", new_group(LIMITS).root)
    program.suspended = Suspended(1, {}, runs_main=True, dump=b"")
    watch = Watch(program, LIMITS)
    watch.begin(1)
    watch.begin_script()
    yield watch
    pool.close()


def test_a_script_that_computes_too_long_is_killed(clock: Clock, watch: Watch) -> None:
    clock.pass_(0.1, 0.09)
    watch.check()
    assert watch.fault is None
    clock.pass_(0.1, 0.02)
    watch.check()
    assert watch.fault is not None and watch.fault.startswith("TimeoutError: a script may compute for 0.1 s")


def test_one_that_others_keep_from_computing_is_given_time(clock: Clock, watch: Watch) -> None:
    while clock.now - 100 < STARVED * patience(LIMIT) - 0.5:
        clock.pass_(0.5, 0.001)
        watch.check()
        assert watch.fault is None
    clock.pass_(1, 0.001)
    watch.check()
    assert watch.fault is not None and watch.fault.startswith("TimeoutError")


def test_one_that_stands_still_is_called_hung(clock: Clock, watch: Watch) -> None:
    clock.pass_(0.3, 0.01)
    watch.check()
    clock.pass_(patience(LIMIT), 0)
    watch.check()
    assert watch.fault == HUNG


def test_after_its_turn_a_script_breaks_no_time_limit(clock: Clock, watch: Watch) -> None:
    clock.pass_(0.1, 0.2)
    watch.end_script()
    watch.check()
    assert watch.fault is None and watch.computed() == pytest.approx(0.2)


def test_what_a_turn_asked_for_is_counted_once_it_has_ended(clock: Clock, watch: Watch) -> None:
    watch.program.host.seconds, watch.program.host.long_seconds = 0.25, 0.5
    clock.pass_(1, 0.125)
    watch.end_script()
    watch.program.host.begin_turn()
    watch.end_script()
    assert watch.total() == pytest.approx(0.875)
