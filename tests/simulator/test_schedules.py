"""Random schedules, from fixed seeds. `SIMULATOR_SCHEDULES=100000 pytest tests/simulator` runs more."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.simulator.schedules import run_schedule
from tests.simulator.settings import random_settings

SCHEDULES = int(os.environ.get("SIMULATOR_SCHEDULES", "1200"))
"""In all regimes together; 100 take about a second."""

REGIMES: dict[str, dict[str, Any]] = {
    "v1-sync": {},
    "v1-async": {"asynchronous": True},
    "v2-sync": {"v2": True},
    "v2-async": {"v2": True, "asynchronous": True},
    "v2-sync-drafts": {"v2": True, "drafts": 2},
    "v2-async-drafts": {"v2": True, "asynchronous": True, "drafts": 2},
    "v1-sync-pipeline": {"stages": 2, "adapters": 0},
    "v2-sync-pipeline": {"v2": True, "stages": 2, "adapters": 0},
    "v2-async-pipeline": {"v2": True, "asynchronous": True, "stages": 2, "adapters": 0},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_schedules_come_to_what_the_reference_says(regime: str) -> None:
    base: dict[str, Any] = {"v2": False, "asynchronous": False, "drafts": 0, "stages": 1}
    for seed in range(SCHEDULES // len(REGIMES)):
        settings = replace(random_settings(random.Random(seed)), **{**base, **REGIMES[regime]})
        try:
            run_schedule(seed, settings)
        except Exception as error:
            error.add_note(f"run_schedule({seed}, {settings})")
            raise
