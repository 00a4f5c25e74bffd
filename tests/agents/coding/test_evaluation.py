"""AICode: fields after every kind of run."""

from __future__ import annotations

import ast

import pytest

from aici_vllm.agents import (
    AICode,
    AIMessage,
    CodeExecutionError,
    CodeParseError,
    CodeProcessDied,
    CodeSafetyError,
    CodeTestFailure,
    CodeTimeout,
)


def test_success() -> None:
    cb = AICode("x = 1 + 1\ny = {'a': [1.5, None]}\nclass C: pass\nprint('hi')")
    assert (cb.success, cb.error, cb.error_lines) == (True, None, [])
    assert isinstance(cb.expression, ast.Module)
    assert cb.stdout == "hi\n"
    assert cb.output["x"] == 2
    assert cb.output["y"] == {"a": [1.5, None]}
    assert cb.output["C"] == "<class '__main__.C'>"
    assert str(cb) == (
        "AICode(Success: True, Parsed: True, Evaluated: True, Error Caught: N/A, StdOut: True, Code: 4 Lines)"
    )


def test_the_last_value_without_safe_eval() -> None:
    assert AICode("x = 20\nx * 2 + 2", safe_eval=False).output == 42
    assert AICode("x = 20", safe_eval=False).output is None
    assert AICode("float('inf')", safe_eval=False).output == "inf"
    assert AICode("x", safe_eval=False, prefix="x = 5", suffix="y = 6").output == 5


def test_lazy() -> None:
    cb = AICode("x = 1", auto_eval=False)
    assert (cb.success, cb.expression, cb.stdout, cb.output, cb.error) == (None,) * 5
    assert str(cb) == (
        "AICode(Success: N/A, Parsed: N/A, Evaluated: N/A, Error Caught: N/A, StdOut: N/A, Code: 1 Lines)"
    )
    assert cb.evaluate() is cb
    assert cb.success is True


def test_an_exception() -> None:
    cb = AICode("def f(x):\n    return 1 / x\n\nf(0)")
    assert cb.success is False
    assert isinstance(cb.error, ZeroDivisionError)
    assert str(cb.error) == "division by zero"
    assert cb.error_lines == [2, 4]
    assert cb.stdout == "ZeroDivisionError: division by zero"
    assert str(cb) == (
        "AICode(Success: False, Parsed: True, Evaluated: N/A, Error Caught: True, StdOut: True, "
        "Code: 4 Lines)"
    )


def test_output_before_an_exception_is_kept() -> None:
    assert AICode("print('a')\n1 / 0").stdout == "a\n"


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        ("{}['key']", KeyError, "'key'"),
        ("open('/nope/nope')", CodeExecutionError, "[Errno 2] No such file or directory: '/nope/nope'"),
        ("undefined", NameError, "name 'undefined' is not defined"),
        ("raise ValueError('a', 2)", ValueError, "('a', 2)"),
        ("raise ValueError", ValueError, ""),
        ("class E(Exception): pass\nraise E('own')", CodeExecutionError, "own"),
        ("class ValueError(Exception): pass\nraise ValueError('fake')", CodeExecutionError, "fake"),
        ("b'\\xff'.decode()", CodeExecutionError, "'utf-8' codec can't decode byte 0xff in position 0"),
        ("raise SystemExit(3)", SystemExit, "3"),
        ("def f(): f()\nf()", RecursionError, "maximum recursion depth exceeded"),
    ],
)
def test_exceptions_come_back(code: str, kind: type[BaseException], text: str) -> None:
    cb = AICode(code)
    assert type(cb.error) is kind
    assert str(cb.error).startswith(text)
    assert cb.error_lines


def test_names_survive() -> None:
    error = AICode("undefined").error
    assert isinstance(error, NameError)
    assert error.name == "undefined"


def test_leaving_in_peace_is_a_success() -> None:
    assert AICode("import sys\nx = 1\nsys.exit()").success is True
    assert AICode("exit(0)").success is True


def test_lines_are_those_of_the_code_not_of_prefix_or_library() -> None:
    cb = AICode("import json\n\njson.loads('{')", prefix="a = 1\nb = 2\n", suffix="c = 3")
    assert cb.error_lines == [3]
    assert AICode("x = 1", prefix="1 / 0").error_lines == []
    assert AICode("def f(): 1 / 0", suffix="f()").error_lines == [1]


def test_errors_in_code_that_the_code_compiles() -> None:
    cb = AICode("x = 1\neval('1 +')")
    assert isinstance(cb.error, SyntaxError)
    assert cb.error_lines == [2]


def test_timeout() -> None:
    cb = AICode("print('start', flush=True)\nwhile True: pass", execution_timeout=1)
    assert cb.success is False
    assert isinstance(cb.error, CodeTimeout)
    assert cb.stdout == "start\n"
    assert isinstance(AICode("raise KeyboardInterrupt").error, CodeTimeout)


def test_memory() -> None:
    cb = AICode("x = bytearray(1 << 30)", memory_limit=512 << 20)
    assert isinstance(cb.error, MemoryError)
    assert cb.error_lines == [1]


def test_a_crash() -> None:
    cb = AICode("import os, signal\nos.kill(os.getpid(), signal.SIGABRT)")
    assert isinstance(cb.error, CodeProcessDied)
    assert "SIGABRT" in str(cb.error)
    assert "exit status 4" in str(AICode("import os\nos._exit(4)").error)


def test_parse_failures() -> None:
    cb = AICode("x = 1\ny = (")
    assert isinstance(cb.error, SyntaxError)
    assert (cb.success, cb.expression, cb.stdout, cb.error_lines) == (False, None, None, [2])
    assert not cb.is_parsed
    assert isinstance(AICode("x\0").error, CodeParseError | SyntaxError)
    assert AICode("(" * 5000).success is False


@pytest.mark.parametrize("code", ["", " \n", AIMessage("no code here")])
def test_no_code(code: str | AIMessage) -> None:
    cb = AICode(code)
    assert str(cb.error) == "Parse Error: No code found!"
    assert isinstance(cb.error, CodeParseError)
    assert cb.success is False


def test_unsafe_code_is_not_run() -> None:
    cb = AICode("print('ran')\nimport nope_a")
    assert isinstance(cb.error, CodeSafetyError)
    assert str(cb.error).startswith("Safety Error: ")
    assert (cb.success, cb.expression, cb.stdout) == (False, None, None)
    assert isinstance(AICode("import nope_a", safe_eval=False).error, ModuleNotFoundError)


def test_unsafe_lines_are_skipped() -> None:
    cb = AICode("!pip install x\nimport nope_a\nprint('ran')", skip_unsafe=True)
    assert cb.success is True
    assert cb.stdout is not None
    assert cb.stdout.startswith("ran\n")
    assert "!!! IMPORTANT: Unsafe lines blocked from execution" in cb.stdout
    assert "!pip install x" in cb.stdout
    assert cb.code == "pass\npass\nprint('ran')"
    assert AICode("!pip install x", skip_unsafe=True).stdout == (
        "!!! IMPORTANT: Unsafe lines blocked from execution\n!pip install x"
    )


def test_messages() -> None:
    message = AIMessage("Look:\n```python\nx = 1\n```\nand\n```python\ny = x +\n```")
    assert AICode(message).success is False
    assert AICode(message, skip_invalid=True).output == {"x": 1}


def test_transforms() -> None:
    code = "def test_x():\n    pass\nassert False\nx = 1"
    assert AICode(code).success is False
    assert AICode(code, expression_transform="remove_all_tests").output == {"x": 1}
    assert AICode(code, expression_transform="remove_test_items").error_lines == [3]


def test_a_failed_unittest_run() -> None:
    code = (
        "import unittest\nclass TestX(unittest.TestCase):\n    def test_a(self): self.assertEqual(1, 2)\n"
        "    def test_b(self): pass\n    def test_c(self): 1 / 0\nunittest.main()"
    )
    error = AICode(code).error
    assert isinstance(error, CodeTestFailure)
    assert error.failures == [
        ("__main__.TestX.test_a", "AssertionError: 1 != 2"),
        ("__main__.TestX.test_c", "ZeroDivisionError: division by zero"),
    ]
    passing = code.replace("1, 2", "1, 1").replace("1 / 0", "pass")
    assert AICode(passing).success is True


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="execution_timeout"):
        AICode("x", execution_timeout=0)
    with pytest.raises(ValueError, match="expression_transform"):
        AICode("x", expression_transform="other")
    with pytest.raises(TypeError, match="AIMessage"):
        AICode(3)  # type: ignore[arg-type]


def test_without_capture(capfd: pytest.CaptureFixture[str]) -> None:
    cb = AICode("print('through')", capture_stdout=False)
    assert cb.stdout is None
    assert capfd.readouterr().out == "through\n"
