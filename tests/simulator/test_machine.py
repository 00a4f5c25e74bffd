"""The simulation as a state machine: Hypothesis invents what happens, and shrinks what goes wrong.

`SIMULATOR_EXAMPLES=2000 pytest tests/simulator` looks further.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from vllm.v1.core.sched.interface import PauseState

from tests.simulator.model import LETTERS, TEXT_TOKENS
from tests.simulator.schedules import Simulation
from tests.simulator.scripts import NAMES, Program, set_once
from tests.simulator.settings import Settings

EXAMPLES = int(os.environ.get("SIMULATOR_EXAMPLES", "150"))

seeds = st.integers(0, 999)
texts = st.text(LETTERS, max_size=8)
tokens = st.sampled_from(TEXT_TOKENS)
splices = st.tuples(st.lists(tokens, max_size=4), st.integers(0, 3), texts)
rules = st.none() | seeds
stops = st.none() | st.sampled_from(LETTERS)
stores = st.none() | st.sampled_from(NAMES)


def operation(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(st.just(name), *arguments).map(list)


operations = st.one_of(
    operation("fixed", texts),
    operation("gen", rules, st.integers(0, 9), stops, stores, st.sampled_from([None, 0.5])),
    operation("token", seeds, st.lists(splices, max_size=2)),
    operation("splice", st.integers(0, 4), texts),
    operation("mark"),
    operation("unmark"),
    operation("back", st.integers(0, 2), texts),
    operation("set", st.sampled_from(NAMES), texts),
    operation("wait", st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)),
    operation("noop"),
    operation("stop"),
    operation("raise"),
)
decisions = st.one_of(st.none(), operation("mask", seeds), operation("splice", st.integers(0, 3), texts))
straight = st.lists(operations, max_size=5)


def forking(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
    child = st.tuples(decisions, inner).map(list)
    fork = st.lists(child, min_size=2, max_size=3).map(lambda children: ["fork", children])
    return st.tuples(straight, fork).map(lambda pair: [*pair[0], pair[1]])


programs = st.one_of(straight, forking(straight), forking(forking(straight))).map(set_once)
prompts = st.lists(tokens, min_size=1, max_size=9)
engines = st.builds(
    Settings,
    asynchronous=st.booleans(),
    v2=st.booleans(),
    block_size=st.sampled_from([2, 4, 16]),
    spare_blocks=st.sampled_from([0, 1, 4, 100]),
    prefix_caching=st.booleans(),
    most_running=st.sampled_from([1, 2, 8]),
    budget=st.sampled_from([4, 24, 200]),
    context=st.just(64),
    policy=st.sampled_from(["fcfs", "priority"]),
    window=st.sampled_from([None, None, None, 12]),
    slow_scripts=st.sampled_from([0, 2]),
    reserve_whole=st.booleans(),
    few_masks=st.booleans(),
    throttled=st.booleans(),
    longest_chunk=st.sampled_from([0, 3]),
    drafts=st.sampled_from([0, 0, 2]),
).map(lambda settings: settings if settings.v2 else replace(settings, drafts=0))


class EngineMachine(RuleBasedStateMachine):
    """An engine to which anything may happen between two steps."""

    @initialize(chosen=engines)
    def start(self, chosen: Settings) -> None:
        self.simulation = Simulation(chosen)
        self.engine = self.simulation.engine

    @rule(prompt=prompts, max_tokens=st.integers(1, 55), salt=st.sampled_from([None, "a"]))
    def plain_request(self, prompt: list[int], max_tokens: int, salt: str | None) -> None:
        self.engine.add_plain(prompt, max_tokens, salt)

    @rule(
        program=programs,
        prompt=prompts,
        max_tokens=st.integers(1, 55),
        choices=st.sampled_from([1, 1, 3]),
        streamed=st.booleans(),
        salt=st.sampled_from([None, "a"]),
        priority=st.integers(0, 1),
        checkpoint=st.booleans(),
        live=st.booleans(),
        goes_on=st.booleans(),
    )
    def controlled_request(self, goes_on: bool, **arguments: Any) -> None:
        kept = sorted(self.engine.scheduler.checkpoints._requests)
        start = kept[-1] if kept and goes_on else None
        self.engine.add_controlled(start=start, **arguments)

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.simulation.step()

    @precondition(lambda self: self.simulation.waiting())
    @rule(which=st.integers(0, 9), one_choice=st.booleans(), during_step=st.booleans())
    def client_goes_away(self, which: int, one_choice: bool, during_step: bool) -> None:
        names = self.simulation.waiting()
        choices = self.engine.jobs[names[which % len(names)]].choices
        self.engine.abort(choices[-1:] if one_choice else choices, during_step)

    @rule(state=st.sampled_from(list(PauseState)))
    def pause(self, state: PauseState) -> None:
        self.engine.pause(state)

    @rule(running_too=st.booleans())
    def reset_prefix_cache(self, running_too: bool) -> None:
        self.engine.reset_prefix_cache(running_too)

    @rule()
    def abort_all(self) -> None:
        self.engine.abort_all()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    derandomize="SIMULATOR_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
