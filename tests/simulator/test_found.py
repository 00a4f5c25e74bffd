"""What the simulator has found, each as the shortest story that shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vllm.v1.core.sched.interface import PauseState

from tests.simulator.schedules import Simulation
from tests.simulator.settings import Settings

PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.mark.parametrize("v2", [False, True])
def test_parked_branches_need_no_slot_of_the_runner(v2: bool) -> None:
    waits = [["fork", [[None, [["gen", None, 9, None, "v0", None]]], [None, [["wait", ["v0"]]]]]]]
    simulation = Simulation(Settings(v2=v2, most_running=1))
    for _ in range(3):
        simulation.engine.add_controlled([["gen", None, 2, None, None, None], *waits], PROMPT, 50)
    simulation.finish()


def test_choices_without_a_branch_are_told_of_an_abort() -> None:
    simulation = Simulation(Settings())
    job = simulation.engine.add_controlled([["gen", None, 9, None, None, None]], PROMPT, 50, choices=3)
    simulation.step()
    simulation.engine.abort_all()
    simulation.finish()
    assert job.closed == {"0_r0", "1_r0", "2_r0"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prefix_cache_can_be_reset_right_after_a_fork(asynchronous: bool) -> None:
    generates = ["gen", None, 6, None, None, None]
    program = [generates, ["fork", [[None, [generates]], [None, [generates]]]]]
    simulation = Simulation(Settings(asynchronous=asynchronous))
    simulation.engine.add_controlled(program, PROMPT, 50)
    for _ in range(40):
        forked = len(simulation.engine.scheduler.requests) > 1
        simulation.step()
        if len(simulation.engine.scheduler.requests) > 1 and not forked:
            simulation.engine.reset_prefix_cache(running_too=True)
            break
    simulation.finish()
    assert simulation.engine.resets == 1


def test_branches_do_not_preempt_each_other_for_ever() -> None:
    generates = ["gen", None, 9, None, None, None]
    children = [[None, [["fixed", text], generates]] for text in ("mdj", "dji", "jip", "ipm")]
    tight = Settings(block_size=16, spare_blocks=0, context=48, prefix_caching=False, policy="priority")
    tight = replace(tight, asynchronous=False, most_running=3, reserve_whole=False, longest_chunk=3)
    simulation = Simulation(tight)
    simulation.engine.add_controlled([["fork", children]], [*PROMPT, *PROMPT, *PROMPT, *PROMPT[:3]], 24)
    simulation.finish()


def test_blocks_of_a_branch_that_waits_for_its_adapters_turn_are_taken_once() -> None:
    """A step passes it over and then, short of blocks for the next request, takes its blocks."""
    generates = ["gen", None, 2, None, None, None]
    simulation = Simulation(
        Settings(asynchronous=False, block_size=16, spare_blocks=0, adapters=1, slow_scripts=2)
    )
    simulation.engine.add_controlled([generates, ["fixed", "ab"]] * 6, PROMPT, 80, adapter=1)
    for max_tokens, prompt in ((20, PROMPT * 2), (10, (PROMPT * 12)[:80])):
        for _ in range(10):
            simulation.step()
        simulation.engine.add_plain(prompt, max_tokens, adapter=2)
    simulation.finish()


def test_drafts_that_a_pause_hides_lead_to_no_unmasked_token() -> None:
    generates = [["gen", seed, 30, None, None, None] for seed in range(1, 8)]
    simulation = Simulation(Settings(drafts=3))
    simulation.engine.add_controlled(generates, PROMPT, 80)
    while simulation.waiting():
        for state in (PauseState.UNPAUSED, PauseState.PAUSED_ALL):
            simulation.engine.pause(state)
            for _ in range(4):
                simulation.step()
    simulation.finish()
