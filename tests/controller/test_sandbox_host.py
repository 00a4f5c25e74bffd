"""What the host makes of what a script hands over: nothing that is refused is copied, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aici_vllm.controller import branch as branch_module
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool, host
from tests.controller.scripts import run_script, script


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(Limits())
    yield pool
    pool.close()


# Decisions.


@pytest.mark.parametrize(
    "await_it, says",
    [
        ("fork([aici.Branch.noop()] * 257)", "too many forks (a request may make 256 branches in all)"),
        ("fork([splicing])", "a splice of 1001 tokens does not fit: the context holds 1000"),
        ("ConstrainedToken", "a splice of 1001 tokens does not fit: the context holds 1000"),
    ],
)
def test_a_decision_that_is_refused_was_not_copied(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch, await_it: str, says: str
) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("a part was copied")

    monkeypatch.setattr(host, "Splice", refuse)
    monkeypatch.setattr(host, "BranchDecision", refuse)
    source = f"""
import aici

splicing = aici.Branch(splices=[aici.Splice(ff_tokens=[97] * 1001)])

class ConstrainedToken:
    def mid_process(self):
        return aici.MidProcessResult([splicing])

async def main():
    await {f"aici.{await_it}" if "(" in await_it else f"{await_it}()"}

aici.start(main)
"""
    (root,) = run_script(pool, source).group.branches
    assert root.error is not None and root.error.startswith(f"RuntimeError: {says} (line ")


def test_the_engine_does_not_check_again_what_the_host_has_made(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch_module, "checked", None)
    body = """
    index = await aici.fork([aici.Branch.noop(), aici.Branch(splices=[aici.Splice(ff_tokens=[97, 98])])])
    await aici.FixedTokens(str(index))
    """
    engine = run_script(pool, script(body))
    assert [engine.text(branch) for branch in engine.group.branches] == ["0", "ab1"]
