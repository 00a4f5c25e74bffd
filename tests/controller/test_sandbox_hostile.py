"""Every script of `hostile/` ends in the error that its first line names, and a neighbour notices nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from tests.controller.fake_engine import FakeEngine
from tests.controller.scripts import new_group, script

LIMITS = Limits(init_seconds=0.2, step_seconds=0.01, late_steps=10, memory=16 << 20)
HOSTILE = sorted(Path(__file__).with_name("hostile").glob("*.py"))
NEIGHBOUR = script(
    """
    await aici.FixedTokens("hello ")
    label = aici.Label()
    for word in ("a", "bc", "def"):
        await aici.FixedTokens(word, following=label)
        aici.append_var("words", await aici.gen_text(regex="[x-z]{2}"))
    """
)


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(LIMITS)
    yield pool
    pool.close()


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_ends_in_its_own_error_and_harms_nobody(path: Path, pool: SandboxPool) -> None:
    source = path.read_text()
    engines = [FakeEngine(new_group(LIMITS, context=200), pool.wait) for _ in range(2)]
    hostile, neighbour = engines
    hostile.group.start(lambda branch: pool.program(source, branch))
    neighbour.group.start(lambda branch: pool.program(NEIGHBOUR, branch))
    for _ in range(100_000):
        for engine in engines:
            engine.round()
        if all(engine.group.finished for engine in engines):
            break

    expected = source.splitlines()[0].removeprefix("# error: ")
    errors = [branch.error for branch in hostile.group.branches if branch.error]
    assert errors and all(re.search(expected, error) for error in errors), errors
    assert all("\n" not in error and len(error) <= 2000 for error in errors), errors
    for branch in hostile.group.branches:
        assert "python-input" not in str(branch.log) + (branch.error or "")
        assert "monty" not in str(branch.log) + (branch.error or "")
        assert len(str(branch.log)) < 4 * LIMITS.log_bytes

    assert neighbour.group.root.finish_reason == "stop", neighbour.group.root.error
    assert neighbour.text(neighbour.group.root) == "hello defxx"
    assert neighbour.group.variables.snapshot() == {"words": b"xxxxxx"}
