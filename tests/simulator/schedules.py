"""A schedule: requests that arrive, go away and meet pauses while the engine steps, all from one seed."""

from __future__ import annotations

import random

from vllm.v1.core.sched.interface import PauseState

from tests.simulator.checks import Checker
from tests.simulator.engine import Engine, EngineError
from tests.simulator.model import TEXT_TOKENS
from tests.simulator.scripts import random_program
from tests.simulator.settings import Settings, random_settings

MOST_IDLE = 400
"""Turns of the loop in a row that may compute nothing: scripts think, and nothing else may take so long."""

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8], [0]]


class Simulation:
    """An engine with its checks, driven one event at a time."""

    def __init__(self, settings: Settings, scheduler_class: type | None = None) -> None:
        self.engine = Engine(settings, scheduler_class)
        self.checker = Checker(self.engine)
        self._idle = 0

    def step(self) -> None:
        """One turn of the loop, and every check."""
        if not self.engine.busy:
            self._check_awake()
            return
        self._idle = 0 if self.engine.step() else self._idle + 1
        if self._idle > MOST_IDLE:
            raise EngineError(f"{MOST_IDLE} steps computed nothing, and {self.waiting()} still wait")
        self.checker.check()

    def finish(self) -> None:
        """Run until everything is over, and compare every answer."""
        self.engine.pause(PauseState.UNPAUSED)
        bound = self.engine.steps + 20_000
        while self.engine.busy:
            self.step()
            if self.engine.steps > bound:
                raise EngineError(f"no end in sight for {self.waiting()}")
        self._check_awake()
        self.checker.check_end()
        for job in self.engine.jobs.values():
            self.engine.check_job(job)

    def shut_down(self) -> None:
        """Stop the engine as it stands: scripts that live are ended."""
        groups = list(self.engine.scheduler._groups.values())
        self.engine.scheduler.shutdown()
        if lives := [group.root_id for group in groups if not group.group.finished]:
            raise EngineError(f"the engine is shut down, and {lives} live on")

    def waiting(self) -> list[str]:
        """Requests whose clients still wait."""
        return [job.name for job in self.engine.jobs.values() if job.waits]

    def _check_awake(self) -> None:
        if self.engine.scheduler.pause_state is PauseState.UNPAUSED and (names := self.waiting()):
            raise EngineError(f"the engine sleeps, and {names} wait for it")


def run_schedule(
    seed: int, settings: Settings | None = None, scheduler_class: type | None = None
) -> Simulation:
    """Run the schedule of a seed to its end, now and then a sudden one; the simulation, for who asks more."""
    rng = random.Random(seed)
    chosen = random_settings(rng)
    simulation = Simulation(settings or chosen, scheduler_class)
    for _ in range(rng.choice([1, 2, 4, 7])):
        _arrive(rng, simulation.engine)
        for _ in range(rng.choice([0, 0, 1, 2, 5, 12])):
            _disturb(rng, simulation.engine)
            simulation.step()
    if rng.random() < 0.02:
        simulation.shut_down()
    else:
        simulation.finish()
    return simulation


def _arrive(rng: random.Random, engine: Engine) -> None:
    prompt = [*rng.choice(PROMPTS)] * rng.choice([1, 1, 2]) + rng.sample(TEXT_TOKENS, rng.choice([0, 0, 3]))
    salt = rng.choice([None, None, None, "a"])
    adapter = rng.randint(0, 3) if engine.settings.adapters else 0
    max_tokens = rng.choice([1, 6, 30, 200, 200])
    max_tokens = min(max_tokens, engine.settings.context - len(prompt))
    priority = rng.randint(0, 2)
    if rng.random() < 0.3:
        engine.add_plain(prompt, max_tokens, salt, priority, adapter)
        return
    kept = sorted(engine.scheduler.checkpoints._requests)
    engine.add_controlled(
        random_program(rng),
        prompt,
        max_tokens,
        choices=rng.choice([1, 1, 2, 4]),
        streamed=rng.random() < 0.5,
        salt=salt,
        priority=priority,
        checkpoint=rng.random() < 0.3,
        start=rng.choice([*kept, "none/0"]) if kept and rng.random() < 0.5 else None,
        drop=rng.choice(kept).split("/")[0] if kept and rng.random() < 0.2 else None,
        live=rng.random() < 0.2,
        adapter=adapter,
    )


def _disturb(rng: random.Random, engine: Engine) -> None:
    chance = rng.random()
    if chance < 0.05:
        engine.pause(rng.choice(list(PauseState)))
    elif chance < 0.12:
        engine.pause(PauseState.UNPAUSED)
    elif chance < 0.15:
        engine.reset_prefix_cache(rng.random() < 0.5)
    elif chance < 0.16:
        engine.abort_all()
    elif chance < 0.23:
        waiting = [job for job in engine.jobs.values() if job.waits]
        if waiting:
            job = rng.choice(waiting)
            # A client gives up all of its request, or one choice of it: never the first one alone.
            ids = (
                job.choices if len(job.choices) == 1 or rng.random() < 0.7 else [rng.choice(job.choices[1:])]
            )
            engine.abort(ids, during_step=rng.random() < 0.5)
