"""Random schedules, from fixed seeds. `SIMULATOR_SCHEDULES=100000 pytest tests/simulator` runs more."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from tests.simulator.schedules import run_schedule
from tests.simulator.settings import random_settings

SCHEDULES = int(os.environ.get("SIMULATOR_SCHEDULES", "1200"))
"""In all regimes together; 100 take about a second."""

REGIMES = {
    "v1-sync": (False, False, False),
    "v1-async": (False, True, False),
    "v2-sync": (True, False, False),
    "v2-async": (True, True, False),
    "v2-sync-drafts": (True, False, True),
    "v2-async-drafts": (True, True, True),
}
"""Model Runner V2, async scheduling, speculative decoding."""


@pytest.mark.parametrize("regime", REGIMES)
def test_schedules_come_to_what_the_reference_says(regime: str) -> None:
    v2, asynchronous, drafting = REGIMES[regime]
    for seed in range(SCHEDULES // len(REGIMES)):
        drafts = 1 + seed % 2 if drafting else 0
        settings = random_settings(random.Random(seed))
        settings = replace(settings, v2=v2, asynchronous=asynchronous, drafts=drafts)
        try:
            run_schedule(seed, settings)
        except Exception as error:
            error.add_note(f"run_schedule({seed}, {settings})")
            raise
