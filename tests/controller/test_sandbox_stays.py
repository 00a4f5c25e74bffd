"""A script that stays in its process between turns loses nothing when the process is lost or needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from aici_vllm.controller.branch import Next
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Raised, Returned, Turn
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox import worker as worker_module
from aici_vllm.controller.sandbox.preludes import Preludes
from aici_vllm.controller.sandbox.worker import WORKER_DIED, Worker
from tests.controller.scripts import VOCABULARY, new_group, run_script, script
from tests.controller.test_sandbox import until

# A process that stands still is found after about a second.
LIMITS = Limits(init_seconds=0.2, step_seconds=0.01, late_steps=10)
WAITING = """
words = ["a"]
await aici.FixedTokens(words[0])
(more,) = await aici.wait_vars("more")
words.append(more.decode())
await aici.FixedTokens(words[1])
"""


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(LIMITS, workers=1, late_workers=0)
    yield pool
    pool.close()


def waiting(pool: SandboxPool) -> Group:
    """A request whose script waits for the variable `more`, and stays in the only process."""
    group = new_group(LIMITS)
    group.start(partial(pool.program, script(WAITING)))
    until(lambda: bool(group.poll()) or group.root.next is Next.WAIT, pool)
    until(lambda: pool._lanes[0].program is None, pool)
    assert pool._lanes[0].stays is group.root.program
    return group


def text_at_the_end(pool: SandboxPool, group: Group) -> bytes:
    group.variables.set("more", b"b")
    group.wake()
    until(lambda: bool(group.poll()) and group.finished, pool)
    assert group.root.finish_reason == "stop", group.root.error
    return VOCABULARY.detokenize(group.root.sequence.tokens)


def test_a_script_that_stays_is_not_loaded_again(pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = waiting(pool)

    def load(*args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("aici_vllm.controller.sandbox.turn.LiveScript.load", load)
    assert text_at_the_end(pool, group) == b"pab"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_process_lost_while_a_script_stays_costs_nothing(pool: SandboxPool, sent: signal.Signals) -> None:
    group = waiting(pool)
    pid = pool._lanes[0].worker._pid
    assert pid is not None
    os.kill(pid, sent)
    assert text_at_the_end(pool, group) == b"pab"
    assert pool.restarts == 1


def test_another_script_takes_the_process(pool: SandboxPool) -> None:
    group = waiting(pool)
    other = run_script(pool, script("await aici.FixedTokens('other')"))
    assert other.text(other.group.root) == "other"
    assert text_at_the_end(pool, group) == b"pab"
    assert pool.restarts == 0


def test_what_a_closed_script_held_is_let_go(pool: SandboxPool) -> None:
    group = waiting(pool)
    group.abort()
    until(lambda: pool._lanes[0].stays is None, pool)
    assert pool._lanes[0].worker.stays is None


def test_many_scripts_do_not_stay(pool: SandboxPool) -> None:
    groups = [new_group(LIMITS) for _ in range(3)]
    for group in groups:
        group.start(partial(pool.program, script(WAITING)))

    def all_wait() -> bool:
        for group in groups:
            group.poll()
        return all(group.root.next is Next.WAIT for group in groups)

    until(all_wait, pool)
    until(lambda: pool._lanes[0].program is None, pool)
    assert pool._lanes[0].stays is None
    assert [text_at_the_end(pool, group) for group in groups] == [b"pab"] * 3


def test_a_script_that_asks_a_lot_is_moved_to_a_fresh_session(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MOST_ASKED", 4)
    body = """
    for number in range(9):
        aici.set_var("n", str(number))
        await aici.FixedTokens(aici.get_var("n").decode())
    """
    engine = run_script(pool, script(body), new_group(LIMITS))
    assert engine.text(engine.group.root) == "012345678"


def test_a_turn_s_time_is_counted_before_its_end_is_told(pool: SandboxPool) -> None:
    worker = Worker(LIMITS, Preludes())
    program = pool.program(script("await aici.FixedTokens('a')"), new_group(LIMITS).root)
    told: list[float] = []

    def answer(turn: Turn) -> None:
        told.append(program.seconds)

    for _ in range(2):
        worker.run(program, answer, keep=lambda: True)
        # What follows, the dump, belongs to the turn as well.
        assert 0 < told[-1] <= program.seconds == worker.script_seconds
        # A next turn that begins elsewhere counts from 0.
        program.host.begin_turn()
    assert told[0] < told[1]
    worker.close()


# The process dies while it makes the dump of a turn whose end has been told.


class Kill:
    """Hears how a turn ended, and kills the process at that very moment."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.turns: list[Turn] = []

    def __call__(self, turn: Turn) -> None:
        self.turns.append(turn)
        assert self.worker._pid is not None
        os.kill(self.worker._pid, signal.SIGKILL)


def test_process_lost_before_the_dump_costs_that_script_only(pool: SandboxPool) -> None:
    worker = Worker(LIMITS, Preludes())
    programs = [pool.program(script("await aici.FixedTokens('a')"), new_group(LIMITS).root) for _ in range(2)]
    kill = Kill(worker)
    worker.run(programs[0], kill, keep=lambda: True)
    child = programs[0].fork(new_group(LIMITS).root)
    assert len(kill.turns) == 1 and not isinstance(kill.turns[0], Raised)
    assert programs[0].ready and child.ready
    ends: list[Turn] = []
    for program in (programs[0], child, programs[1], programs[1]):
        worker.run(program, ends.append, keep=lambda: True)
    assert ends[:2] == [Raised(WORKER_DIED)] * 2
    assert not isinstance(ends[2], Raised) and isinstance(ends[3], Returned)
    assert worker.restarts == 1
    worker.close()
