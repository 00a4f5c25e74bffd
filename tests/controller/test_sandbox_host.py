"""What the host makes of what a script hands over: nothing that is refused is copied, and nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from aici_vllm import aici
from aici_vllm.controller import branch as branch_module
from aici_vllm.controller import words
from aici_vllm.controller.awaits import Generate
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool, host
from constraints import Constraint, Vocabulary
from tests.controller.native import run
from tests.controller.scripts import VOCABULARY, new_group, run_script, script


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


# Text.


def test_long_lists_of_tokens_become_text_piece_by_piece(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    detokenize = VOCABULARY.detokenize

    def noted(ids: list[int]) -> bytes:
        lengths.append(len(ids))
        return detokenize(ids)

    monkeypatch.setattr(VOCABULARY, "detokenize", noted)
    body = """
    print(aici.detokenize([97] * 10_000) == b"a" * 10_000, aici.detokenize([]))
    for word in (aici.detokenize, aici.tokens_repr):
        try:
            word([258] * 220_000)
        except ValueError as error:
            print(error)
    await aici.Noop()
    """
    assert str(run_script(pool, script(body)).group.root.log) == (
        "True b''\n"
        "the text of 220000 tokens is longer than 1048576 bytes\n"
        "tokens_repr() takes 65536 tokens at most, not 220000\n"
    )
    assert max(lengths) == host.PIECE and sum(lengths) < 10_000 + 220_000


# Generations.


def test_a_constraint_is_prepared_where_a_script_is_answered(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    prepare = words.prepare

    def noted(branch: Branch, request: Generate) -> None:
        threads.append(threading.current_thread().name)
        prepare(branch, request)

    async def controller() -> None:
        await aici.gen_tokens(regex="a")

    monkeypatch.setattr(words, "prepare", noted)
    # What runs in the engine's own thread gains nothing from it.
    run(controller)
    assert threads == []
    run_script(pool, script("await aici.gen_tokens(regex='a')\nawait aici.gen_text(regex='b')"))
    assert threads == ["aici-sandbox"] * 2


# Labels.


def test_a_script_holds_so_many_labels(pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MOST_LABELS", 3)
    body = """
    first = aici.Label()
    await aici.FixedTokens("a")
    for _ in range(5):
        aici.Label()
        aici.Label()
        await aici.FixedTokens("b", following=first)
    print([aici.Label().ptr for _ in range(2)])
    aici.Label()
    """
    root = run_script(pool, script(body)).group.root
    assert "[1, 1]\n" in str(root.log), "those whose text was taken back do not count"
    assert root.error is not None
    assert root.error.startswith("RuntimeError: a script may hold 3 labels")


# What a turn may ask for.


def test_a_script_awaits_so_many_things_at_once(pool: SandboxPool) -> None:
    body = """
    import asyncio
    print(await asyncio.gather(*[aici.FixedTokens("a") for _ in range(64)]))
    await asyncio.gather(*[aici.FixedTokens("b") for _ in range(65)])
    """
    engine = run_script(pool, script(body))
    root = engine.group.root
    assert root.error == "RuntimeError: a script may await 64 things at once"
    assert engine.text(root) == "a" * 64


class Clock:
    """Stands in for the module `time`: every long word takes 0.4 s, another one nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def thread_time(self) -> float:
        return self.now


def test_long_words_have_time_of_their_own_in_each_turn(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, regex = Clock(), host.constraints.regex

    def slow_regex(vocabulary: Vocabulary, pattern: str) -> Constraint:
        clock.now += 0.4
        return regex(vocabulary, pattern)

    monkeypatch.setattr(host.constraints, "regex", slow_regex)
    monkeypatch.setattr(host, "time", clock)
    body = """
    for _ in range(2):
        for letter in "abc":
            aici.RegexConstraint(letter)
        print(aici.tokenize("x"))
        await aici.Noop()
    for letter in "abcd":
        try:
            aici.RegexConstraint(letter)
        except Exception:
            pass
        print(letter)
    """
    root = run_script(pool, script(body)).group.root
    assert root.error is not None
    assert root.error.startswith("TimeoutError: fixed texts and constraints may take 1 s between two awaits")
    assert str(root.log) == "[120]\n[120]\na\nb\nc\n"
    assert root.program is not None and root.program.seconds >= 3 * 3 * 0.4


def test_arguments_that_are_refused_cost_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def size(value: object) -> int:
        clock.now += 0.5
        return host.LARGEST_ARGUMENT + 1

    monkeypatch.setattr(host, "time", clock)
    monkeypatch.setattr(host, "_size", size)
    asked = host.Host(new_group().root)
    for name in "tokenize", "get_var", "FixedTokens":
        with pytest.raises(ValueError, match="the arguments of one call may hold 1048576"):
            asked.call(name, [1, "x"], {})
    assert (asked.seconds, asked.long_seconds) == (1.0, 0.5)
