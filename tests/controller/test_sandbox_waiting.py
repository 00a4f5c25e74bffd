"""Which turn comes next: requests take turns, and turns wait for the dump of the one before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox.program import SandboxProgram, Suspended
from aici_vllm.controller.sandbox.waiting import WaitingTurns
from tests.controller.scripts import new_group


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(Limits())
    yield pool
    pool.close()


def programs(pool: SandboxPool, count: int) -> list[SandboxProgram]:
    """Branches of one request."""
    root = new_group().root
    return [pool.program("", root) for _ in range(count)]


def taken(waiting: WaitingTurns) -> list[SandboxProgram]:
    found = []
    while (program := waiting.take()) is not None:
        found.append(program)
    return found


def test_requests_take_turns(pool: SandboxPool) -> None:
    many, few, one = programs(pool, 4), programs(pool, 2), programs(pool, 1)
    waiting = WaitingTurns()
    for program in [*many, *few, *one]:
        waiting.append(program)
    assert len(waiting) == 7 and set(waiting) == {*many, *few, *one}
    expected = [many[0], few[0], one[0], many[1], few[1], many[2], many[3]]
    assert taken(waiting) == expected
    assert len(waiting) == 0


def test_a_request_that_comes_back_is_last(pool: SandboxPool) -> None:
    first, second = programs(pool, 2), programs(pool, 2)
    waiting = WaitingTurns()
    for program in [*first, *second]:
        waiting.append(program)
    assert waiting.take() is first[0]
    waiting.append(first[0])
    assert taken(waiting) == [second[0], first[1], second[1], first[0]]


def test_turns_wait_for_their_dump_and_no_other_does(pool: SandboxPool) -> None:
    (unready, closed, ready), (other,) = programs(pool, 3), programs(pool, 1)
    unready.suspended = Suspended(1, {}, runs_main=True)
    closed.closed = True
    waiting = WaitingTurns()
    for program in (unready, closed, ready, other):
        waiting.append(program)
    assert taken(waiting) == [ready, other]
    assert list(waiting) == [unready]
    unready.suspended.dump = b"all of it"
    assert taken(waiting) == [unready]
