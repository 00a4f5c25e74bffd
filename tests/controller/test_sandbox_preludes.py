"""What a script finds in its session: every word that it can name, and what runs after its own lines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox import preludes as preludes_module
from aici_vllm.controller.sandbox.host import WORDS
from aici_vllm.controller.sandbox.preludes import EVERYTHING, LARGE, needs
from tests.controller.scripts import run_script, script


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(Limits())
    yield pool
    pool.close()


@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_word_that_is_named_is_there(name: str) -> None:
    assert name in needs(f"from aici import {name} as x").words
    assert name in needs(f"f'{{aici.{name}}}'").words


def test_words_that_are_not_named_are_not_there() -> None:
    needed = needs("import aici\nawait aici.FixedTokens('a')")
    assert needed.words == {"FixedTokens", "begin_main"}
    assert not (needed.label or needed.decides or needed.tasks)


@pytest.mark.parametrize(
    "source",
    [
        "getattr(aici, 'gen_' + 'text')",
        "eval('aici.gen_' + 'text')",
        "vars(aici)['gen_' + 'text']",
        "aici.__dict__['gen_' + 'text']",
        "class Own:\n    def mid_process(self): pass",
        "#" * (LARGE + 1),
        # Python reads this as getattr.
        "\uff47etattr(aici, 'gen_' + 'text')",
    ],
)
def test_who_may_reach_anything_gets_everything(source: str) -> None:
    assert needs(source) == EVERYTHING


def test_a_word_in_other_letters_is_named() -> None:
    assert "get_var" in needs("aici.\uff47et_var").words


def test_a_word_reached_without_its_name(pool: SandboxPool) -> None:
    engine = run_script(pool, script("print(getattr(aici, 'eos_' + 'token')())\nawait aici.FixedTokens('a')"))
    assert "256\n" in str(engine.group.root.log)


def test_labels_of_the_script_s_own(pool: SandboxPool) -> None:
    engine = run_script(pool, script("await aici.FixedTokens(str(Label))"))
    assert engine.group.root.error == "NameError: name 'Label' is not defined (line 5)"


def test_preludes_are_bounded(pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preludes_module, "MOST_PRELUDES", 2)
    for word in ("eos_token", "get_tokens", "get_prompt_len", "eos_token"):
        engine = run_script(pool, script(f"await aici.FixedTokens(str(aici.{word}()))"))
        assert engine.group.root.error is None
    assert len(pool._preludes._made) == 2


# What runs after the script's own lines.


def test_awaits_before_and_after_the_start(pool: SandboxPool) -> None:
    source = """
import aici
await aici.FixedTokens("a")

async def main():
    await aici.FixedTokens("c")
    await aici.fork(2)
    await aici.FixedTokens("d")

aici.test(main)
await aici.FixedTokens("b")
"""
    engine = run_script(pool, source)
    assert [engine.text(branch) for branch in engine.group.branches] == ["abcd"] * 2
    assert [str(branch.log).endswith("TEST OK\n") for branch in engine.group.branches] == [True, True]


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ("async def main(a, b): pass", "TypeError: main() missing 2 required positional arguments"),
        ("async def main(a):\n    main()", "TypeError: main() missing 1 required positional argument: 'a'"),
        ("async def main(a):\n    await 3", "TypeError: 'int' object can't be awaited"),
        ("async def main():\n    missing(1)\ndef missing(): pass", "TypeError: missing() takes 0"),
    ],
)
def test_errors_of_calls_are_the_script_s_own(pool: SandboxPool, main: str, message: str) -> None:
    error = run_script(pool, f"import aici\n{main}\naici.start(main)").group.root.error
    assert error is not None and error.startswith(message) and "(line " in error


def test_a_task_may_set_what_another_waits_for(pool: SandboxPool) -> None:
    body = """
    import asyncio

    async def waits():
        return await aici.wait_vars("x")

    async def sets():
        aici.set_var("x", "found")
        await aici.FixedTokens("a")

    print(await asyncio.gather(waits(), sets()))
    """
    engine = run_script(pool, script(body))
    assert engine.group.root.error is None
    assert "[[b'found'], None]" in str(engine.group.root.log)
