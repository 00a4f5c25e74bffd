"""How long steps wait for scripts: for each turn once, and never for one that has no patience left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from aici_vllm.controller.branch import Next
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox import patience as patience_module
from aici_vllm.controller.sandbox.patience import SAVED, SHARE, Patience
from aici_vllm.controller.sandbox.program import SandboxProgram
from tests.controller.scripts import new_group, script
from tests.controller.test_sandbox import until


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_patience_is_spent_and_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(patience_module, "time", clock)
    script_patience = Patience()
    assert script_patience.left() == SAVED
    script_patience.spend(SAVED)
    assert script_patience.left() == 0
    clock.now += 0.01
    assert script_patience.left() == pytest.approx(0.01 * SHARE)
    assert script_patience.copy().left() == script_patience.left()
    clock.now += 1000
    assert script_patience.left() == SAVED


COMPUTES = Limits(step_seconds=0.5, late_steps=100)
AFTER_AN_AWAIT = "await aici.FixedTokens('a')\nprint('computing')\nwhile True: pass"


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(COMPUTES)
    yield pool
    pool.close()


def computing(pool: SandboxPool) -> Group:
    """A request whose script has begun a turn that does not end."""
    group = new_group(COMPUTES)
    group.start(lambda branch: pool.program(script(AFTER_AN_AWAIT), branch))

    def begun() -> bool:
        group.poll()
        return "computing" in str(group.root.log)

    until(begun, pool)
    return group


def program(group: Group) -> SandboxProgram:
    assert isinstance(group.root.program, SandboxProgram)
    return group.root.program


def test_a_step_waits_for_each_turn_once(pool: SandboxPool) -> None:
    group = computing(pool)
    assert pool.hold_up(0.001)
    assert not pool.hold_up(1000), "a second step waited for the same turn"
    group.abort()


def test_a_script_without_patience_holds_up_nothing(pool: SandboxPool) -> None:
    group = new_group(COMPUTES)
    group.start(lambda branch: pool.program(script(AFTER_AN_AWAIT), branch))
    program(group).patience.spend(1000)
    until(lambda: bool(group.poll()) or "computing" in str(group.root.log), pool)
    assert not pool.hold_up(1000)
    group.abort()


def test_a_script_that_begins_holds_up_nothing(pool: SandboxPool) -> None:
    group = new_group(COMPUTES)
    group.start(lambda branch: pool.program("while True: pass", branch))
    assert not pool.hold_up(1000)
    group.abort()


def test_holding_up_ends_with_the_last_turn_awaited(pool: SandboxPool) -> None:
    group = new_group(COMPUTES)
    group.start(lambda branch: pool.program(script("await aici.FixedTokens('a')"), branch))
    until(lambda: pool.turns == 1, pool)
    group.poll()
    assert group.root.next in (Next.THINK, Next.END)
    pool.hold_up(1000)
    group.poll()
    assert group.root.next is Next.END


def test_holding_up_ends_when_the_script_is_closed(pool: SandboxPool) -> None:
    group = computing(pool)
    held = threading.Thread(target=pool.hold_up, args=[1000], daemon=True)
    held.start()
    until(lambda: pool._held_up_since is not None, pool)
    group.abort()
    held.join(20)
    assert not held.is_alive()
