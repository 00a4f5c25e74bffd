"""Limits: upstream's numbers by default, an operator's where set, and nothing that is no limit."""

from __future__ import annotations

import dataclasses
import math

import pytest

from aici_vllm.controller.limits import Limits

SECONDS = {"init_seconds", "step_seconds"}


def test_the_defaults_are_upstreams() -> None:
    limits = Limits()
    assert (limits.init_seconds, limits.step_seconds, limits.branches) == (1.0, 0.025, 16)
    assert (limits.memory, limits.log_bytes, limits.late_steps) == (64 << 20, 64 << 10, 10)
    assert Limits.from_config({}) == limits


def test_what_upstream_leaves_open_is_bounded_too() -> None:
    limits = Limits()
    assert limits.branches_made == limits.branches**2
    assert limits.checkpoints == 256


def test_an_operator_sets_any_of_them() -> None:
    config = {field.name: 3 for field in dataclasses.fields(Limits)} | {"step_seconds": 0.5}
    assert dataclasses.asdict(Limits.from_config(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().branches = 1  # type: ignore[misc]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown limit 'branch'; the limits are init_seconds, .*branches"):
        Limits.from_config({"branch": 3})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, True, "3", None, math.nan, [3]])
def test_a_limit_is_a_positive_number(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"limit {name} must be a positive .*number, not "):
        Limits.from_config({name: value})


@pytest.mark.parametrize("field", dataclasses.fields(Limits), ids=lambda field: field.name)
def test_only_seconds_may_be_fractions(field: dataclasses.Field[object]) -> None:
    if field.name in SECONDS:
        assert getattr(Limits.from_config({field.name: 2.5}), field.name) == 2.5
    else:
        with pytest.raises(ValueError, match=f"limit {field.name} must be a positive whole number, not 2.5"):
            Limits.from_config({field.name: 2.5})
