"""Every gap of the sandbox's Python gives an observation that says what to write instead."""

import pytest

from aici_vllm.recursive import Sandbox
from aici_vllm.recursive.chat import run_to_end
from aici_vllm.recursive.sandbox_hints import MODULES, hint_for


@pytest.fixture(scope="module")
def box():
    made = Sandbox({"llm_query_batched": lambda prompts: prompts}, {"context": "a b"})
    yield made
    run_to_end(made.close())


@pytest.mark.parametrize(
    ("code", "advice", "instead"),
    [
        ("class E(Exception):\n    pass", "plain class", "class E:\n    pass\nE()"),
        ("from enum import Enum", "plain constants", "RED = 1"),
        ("def g():\n    yield 1", "Collect the items in a list", "def g():\n    return [1]"),
        ("d = {'a': 1}\ndel d['a']", "d.pop(key)", "d = {'a': 1}\nd.pop('a')"),
        ("class C:\n    @property\n    def p(self):\n        return 1", "ordinary method",
         "class C:\n    def p(self):\n        return 1\nC().p()"),
        ("try:\n    1\nexcept* ValueError:\n    1", "Use `except`", "try:\n    1\nexcept ValueError:\n    1"),
        ("type X = int", "Leave the alias out", "x = 1"),
        ("next(i for i in [1])", "use iter()", "next(iter([i for i in [1]]))"),
        ("import re\nre.sub('a', lambda m: 'b', 'a')", "re.finditer", "import re\nre.finditer('a', 'a')"),
        ("sorted(['b', 'A'], key=str.lower)", "lambda", "sorted(['b', 'A'], key=lambda s: s.lower())"),
        ("f = 'a'.upper", "Wrap it", "f = lambda: 'a'.upper()"),
        ("from collections import OrderedDict", "A dict keeps the order", "{}"),
        ("from dataclasses import asdict", "Build the dict", "{}"),
        ("from functools import wraps", "Leave the decorator out", "1"),
        ("await llm_query_batched(['a'])", "leave out await", "llm_query_batched(['a'])"),
        ("import asyncio\nasyncio.gather(llm_query_batched(['a']))", "leave out await", "1"),
        ("import numpy as np", "use lists", "sum([1, 2])"),
        ("import pandas", "collections.defaultdict", "from collections import defaultdict"),
        ("import statistics", "sum(values) / len(values)", "values = [1, 3]\nsum(values) / len(values)"),
        ("from concurrent.futures import ThreadPoolExecutor", "llm_query_batched", "1"),
        ("import traceback", "print the exception", "try:\n    1 / 0\nexcept Exception as e:\n    print(e)"),
        ("import requests", "no network", "1"),
        ("import no_such_module", "Available modules", "1"),
        ("exit()", "call FINAL(answer)", "FINAL('x')"),
        ("raise SystemExit(3)", "call FINAL(answer)", "FINAL('x')"),
        ("input('?')", "The data is in `context`", "context"),
        ("globals()", "SHOW_VARS()", "SHOW_VARS()"),
        ("issubclass(int, object)", "isinstance", "isinstance(1, int)"),
        ("llm_query('x')", "No language model is connected", "1"),
        ("open('data.txt')", "no files", "context"),
        ("import os\nos.environ['HOME']", "no environment variables", "context"),
        ("callable(len)", "built-in `callable` is not available", "1"),
        ("'abc'.translate({97: 98})", "`str.translate` is not available", "'abc'.replace('a', 'b')"),
        ("import collections\ncollections.ChainMap()", "no such name here", "{**{}, **{}}"),
        ("class A:\n    def __len__(self):\n        return 1\nlen(A())", "ordinary method", "1"),
        ("import sys\nsys.stdout.write('x')", "Use print", "print('x')"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "loop", "1"),
        ("(" * 3000 + ")" * 3000, "several statements", "1"),
    ],
)  # fmt: skip
def test_a_gap_fails_with_advice_and_the_advice_works(box, code, advice, instead):
    failed = run_to_end(box.run(code))
    assert failed.error is not None
    assert "HINT: " in failed.trace and advice in failed.trace
    assert run_to_end(box.run(instead)).error is None


@pytest.mark.parametrize("module", MODULES.split(", "))
def test_every_module_that_is_named_can_be_imported(box, module):
    assert run_to_end(box.run(f"import {module}")).error is None


@pytest.mark.parametrize(
    "error",
    [
        "ValueError: x",
        "KeyError: 'a'",
        "NameError: name 'foo' is not defined",
        "AttributeError: 'str' object has no attribute 'nonsense'",
        "TypeError: object of type 'int' has no len()",
        "TypeError: '<' not supported between instances of 'str' and 'int'",
    ],
)
def test_errors_that_python_has_too_get_no_advice(error):
    assert hint_for(error) is None
