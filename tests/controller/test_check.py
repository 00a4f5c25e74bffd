"""What is refused before a script runs, where, and whether a script can take text back."""

from __future__ import annotations

import ast
import string
import time
from pathlib import Path

import pydantic_monty
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.controller.check import (
    MODULES,
    SEARCHED,
    TakesBack,
    all_errors,
    check_source,
    takes_back,
)
from aici_vllm.controller.errors import ScriptError
from aici_vllm.controller.limits import Limits
from tests.controller.scripts import script

LIMITS = Limits()
GOOD = script("await aici.FixedTokens('a')")


def refusal(source: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(ScriptError) as caught:
        check_source(source, limits)
    return str(caught.value)


def test_good_script() -> None:
    check_source(GOOD, LIMITS)


@pytest.mark.parametrize(
    "source",
    [
        GOOD.replace("import aici", "import pyaici.server as aici"),
        GOOD.replace("import aici", "from aici_vllm import aici"),
        GOOD.replace("import aici", "from pyaici import server as aici"),
        GOOD.replace("aici.start", "aici.test"),
        GOOD.replace("import aici", "import aici\nfrom aici import start").replace("aici.start", "start"),
        GOOD.replace("\n", "\r\n"),
        "from __future__ import annotations\n" + GOOD,
    ],
)
def test_takes_every_way_to_write_it(source: str) -> None:
    check_source(source, LIMITS)


SANDBOX_REFUSES = {
    "class A(B): pass": "no class inheritance: write `class A:`",
    "class A(aici.NextToken): pass": "any object with a mid_process method can be awaited",
    "class A(Constraint): pass": "with eos_allowed, eos_forced",
    "class A(ValueError): pass": "raise one of Python's own exceptions",
    "class A(metaclass=type): pass": "no class inheritance",
    "class A:\n    @property\n    def x(self): pass": "write x as a plain one",
    "class A:\n    class B: pass": "move line 3 out of class A",
    "class A:\n    x, y = 1, 2": "move line 3 out of class A",
    "def f():\n    yield 1": "no generators",
    "def f():\n    yield from []": "no generators",
    "async def f():\n    async for x in y: pass": "no async for",
    "async def f():\n    async with y: pass": "no async with",
    "async def f():\n    return [x async for x in y]": "no async comprehensions",
    "x = 1\ndel x": "no del",
    "try:\n    pass\nexcept* ValueError:\n    pass": "no except*",
    "x = 1\nx @= 2": "no @=",
    "raise ValueError('a', 'b')": "take one string",
    "import socket": "no module 'socket'",
    "import os, subprocess": "no module 'subprocess'",
    "from collections.abc import Mapping": "no module 'collections.abc'",
    "from math import *": "no `import *`",
    "from . import x": "without the leading dots",
}


@pytest.mark.parametrize(("code", "message"), SANDBOX_REFUSES.items())
def test_refuses_what_the_sandbox_cannot_run(code: str, message: str) -> None:
    source = f"import aici\n{code}\naici.start(main)\n"
    found = refusal(source)
    assert message in found
    assert found.startswith("line ")
    # The sandbox itself is the oracle: it runs none of these.
    with (
        pydantic_monty.Monty(max_processes=1) as monty,
        monty.checkout() as session,
        pytest.raises(pydantic_monty.MontyError) as caught,
    ):
        session.feed_run(code)
    assert not isinstance(caught.value, pydantic_monty.MontyCrashedError)


NATIVE_WORDS = {
    "import pyaici.server_native as native": "there is no pyaici.server_native here: import pyaici.server",
    "from pyaici.server_native import tokenize": "there is no pyaici.server_native here",
    "from pyaici import server_native": "there is no pyaici.server_native here",
    "aici.register(callbacks)": "aici has no register() here: give aici.start() a coroutine",
    "print(aici.self_seq_id())": "aici has no self_seq_id() here: aici.fork() returns the number",
    "from pyaici.server import gen_text, is_server_side": "aici has no is_server_side() here",
}


@pytest.mark.parametrize(("code", "message"), NATIVE_WORDS.items())
def test_refuses_what_only_upstream_has(code: str, message: str) -> None:
    found = refusal(f"import aici\n{code}\naici.start(main)\n")
    assert found.startswith("line 2: ") and message in found


def test_takes_a_script_s_own_words_of_the_same_names() -> None:
    check_source(GOOD + "class A:\n    def register(self): pass\nA().register()\nregister = 1\n", LIMITS)


SANDBOX_RUNS = [
    'class A:\n    """doc"""\n    x: int = 3\n    y = [1]\n    def f(self): return self.x\nA().f()',
    "def d(f): return f\n@d\ndef g(): pass\ng()",
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)",
    "match [1, 2]:\n    case [a, *b] if a: pass\n    case _: pass",
    "with_ = [x for x in [1, 2] if x]; {k: v for k, v in zip([1], [2])}",
    "x = (y := 3); f'{x!r:>5}'; lambda a, *b, c=1, **d: a",
    "try:\n    1 / 0\nexcept (KeyError, ArithmeticError) as e:\n    pass\nelse:\n    pass\nfinally: pass",
    "async def f(): return [await g() for _ in []]",
    "a, (b, *c) = 1, (2, 3); x = y = 0; x += 1; global_ = 1",
]


@pytest.mark.parametrize("code", SANDBOX_RUNS)
def test_takes_what_the_sandbox_runs(code: str) -> None:
    check_source(f"import aici\n{code}\naici.start(main)\n", LIMITS)
    with pydantic_monty.Monty(max_processes=1) as monty, monty.checkout() as session:
        session.feed_run(code)


def test_modules_are_those_of_the_sandbox() -> None:
    with pydantic_monty.Monty(max_processes=1) as monty, monty.checkout() as session:
        for module in MODULES:
            session.feed_run(f"import {module}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "the script never imports aici: begin it with `import aici`"),
        ("import aici\n", "the script never calls aici.start(...): end it with `aici.start(main())`"),
        ("import aici\nx = (\n", "line 2: SyntaxError: '(' was never closed"),
        ("import aici\nif x:\n\ty\n        z\n", "line 4: SyntaxError: inconsistent use of tabs and spaces"),
        ("import aici\nx = 'a\0b'\n", "line 2: the script holds a null byte"),
        ("import aici\nx = '\ud800'\n", "line 2: the script holds half a character"),
        ("import aici\nx\u200b = 1\n", "line 2: SyntaxError: invalid non-printable character U+200B"),
        ("\ufeffimport aici\n", "line 1: SyntaxError: invalid non-printable character U+FEFF"),
        ("x = " + "-" * 100_000 + "1", "words and signs outside strings"),
        ("a=1\n" * 3400, "put data into controller_arg, or into strings"),
        ("f'" + "{a}" * 3400 + "'", "words and signs outside strings"),
        ("x = " + "-" * 8000 + "1", "nested too deeply"),
        ("x = 1" + "+1" * 4000, "nested too deeply"),
        ("x = a" + ".b" * 4000, "nested too deeply"),
        ("(" * 5000, "SyntaxError: too many nested parentheses"),
        ("@(" + "1+" * 900 + "1)\nclass A(" + "a." * 900 + "b): pass", ""),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_refuses_broken_source(source: str, message: str) -> None:
    assert message in refusal(source)


def test_size_is_counted_in_bytes() -> None:
    limits = Limits(source_bytes=len(GOOD) + 10)
    check_source(GOOD + "#" * 10, limits)
    assert f"has {len(GOOD) + 12} bytes" in refusal(GOOD + "#" + "é" * 5 + "#", limits)
    assert "bytes" in refusal(GOOD + "#" * 11, limits)


COSTLY = {
    "statements": "a=1\n" * 260_000,
    "one f-string": 'f"' + "{a}" * 300_000 + '"',
    "many f-strings": ('f"""' + "{a}" * 5000 + '"""\n') * 20,
    "quotes": '"' * 1_000_000,
    "open string": '"' + '\\"' * 500_000,
    "open text": "'''" + '"' * 1_000_000,
    "lines of open strings": "'\n" * 500_000,
    "comments": "#\n" * 500_000,
    "calls": "FixedTokens(" * 80_000,
    "calls with texts": 'FixedTokens(""' * 70_000,
    "call with many texts": "FixedTokens(" + '""' * 500_000,
    "one word": "a" * 1_000_000,
    "list": "x = [" + "1," * 500_000 + "]",
}


@pytest.mark.parametrize("source", COSTLY.values(), ids=COSTLY)
def test_nobody_can_keep_the_parser_busy(source: str) -> None:
    # Not a measurement: without the check one of these takes a minute, and some take seconds.
    started = time.process_time()
    refusal(source)
    takes_back(source)
    assert time.process_time() - started < 5


@given(st.text(alphabet=string.printable + "'\"\\{}#\0é", max_size=200))
def test_any_text_is_taken_or_refused(text: str) -> None:
    try:
        check_source(text, LIMITS)
    except ScriptError:
        return
    ast.parse(text)


# Taking text back.

CANNOT = [
    "await aici.FixedTokens('a')",
    "await aici.FixedTokens(\"a, b\" 'c')",
    "await aici.FixedTokens(text)\nl = aici.Label()\nprint(l.text_since())",
    "await aici.FixedTokens(self.text)",
    "await aici.FixedTokens( f'{a}, {b}' )",
    "await aici.gen_tokens(regex='x', store_var='y')",
    "await aici.fork(3)",
]
CAN = [
    "await aici.FixedTokens('a', following=l)",
    "await aici.FixedTokens('a', l)",
    "await aici.FixedTokens(*both)",
    "await aici.FixedTokens(**both)",
    "await aici.FixedTokens \\\n('a', l)",
    "write = aici.FixedTokens\nawait write('a', l)",
    "await aici.FixedTokens(f'{await aici.FixedTokens(1, l)}')",
    "from aici import FixedTokens as F\nawait F('a', l)",
    "await aici.FixedTokens('a', ﬀollowing=l)",
    "await aici.𝔽ixedTokens('a', l)",  # noqa: RUF001
]
CAN_WITHOUT_A_LABEL = [
    "await getattr(aici, 'Fixed' + 'Tokens')('a', l)",
    'await eval("aici.Fixed" "Tokens(\'a\', l)")',
    "exec('x')",
    "await aici.fork([aici.Branch(splices=[aici.Splice(backtrack=1, ff_tokens=[])])])",
    "return aici.MidProcessResult.splice(1, [])",
    "class Back(aici.𝐍extToken): pass",  # noqa: RUF001
]


@pytest.mark.parametrize("body", CANNOT)
def test_cannot_take_back(body: str) -> None:
    assert takes_back(script(body)) is TakesBack.NOTHING


@pytest.mark.parametrize("body", CAN)
def test_can_take_back(body: str) -> None:
    assert takes_back(script(body)) is TakesBack.MARKED


@pytest.mark.parametrize("body", CAN_WITHOUT_A_LABEL)
def test_can_take_back_without_a_label(body: str) -> None:
    assert takes_back(script(body)) is TakesBack.ANYTHING


def test_a_long_script_is_taken_to_do_what_its_words_could() -> None:
    long = f"text = {'a' * SEARCHED!r}\n"
    assert takes_back(script(long)) is TakesBack.MARKED
    assert takes_back(script(long + "aici.Splice(backtrack=1, ff_tokens=[])")) is TakesBack.ANYTHING


def test_hostile_scripts_are_looked_at_safely() -> None:
    for path in Path(__file__).with_name("hostile").glob("*.py"):
        try:
            check_source(path.read_text(), LIMITS)
        except ScriptError as error:
            assert str(error)


def test_all_errors_are_found_by_line() -> None:
    source = "import socket\nasync def main():\n    del x\n    yield 1\n\nclass A(int):\n    pass\n"
    found = all_errors(source, LIMITS)
    assert [error.line for error in found] == [None, None, 1, 3, 4, 6]
    assert all_errors(GOOD, LIMITS) == []
    (only,) = all_errors("def f(:\n", LIMITS)
    assert only.line == 1
