"""What is refused or cut out before code runs."""

from __future__ import annotations

import ast

import pytest

from aici_vllm.agents.coding.safety import blank_statements, find_unsafe, remove_unsafe, transform_code


@pytest.mark.parametrize(
    "code",
    [
        "!pip install x",
        "%pip install -q x",
        "x = 1\npip install x",
        "  python -m pip install x",
        "conda install -c forge x",
        "uv pip install x",
        "import pip",
        "from pip import main",
        "import os\nos.system('pip install x')",
        "import os\nos.system('python -m pip install x')",
        "import subprocess\nsubprocess.run(['pip', 'install', 'x'])",
        "import subprocess, sys\nsubprocess.check_call([sys.executable, '-m', 'pip', 'install', 'x'])",
        "import subprocess\nif True:\n    subprocess.run(args='conda install x', shell=True)",
        "from os import system\nsystem('apt-get install x')",
        "import a_module_that_is_not_there",
        "from a_module_that_is_not_there.sub import x",
        "def f():\n    import a_module_that_is_not_there",
    ],
)
def test_refused(code: str) -> None:
    assert find_unsafe(code)


@pytest.mark.parametrize(
    "code",
    [
        "x = 'pip install x'",
        "print('to install: pip install x')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run(['git', 'add', 'x'])",
        "import json, os.path\nfrom collections import abc",
        "from . import sibling",
        "from __future__ import annotations",
        "try:\n    import a_module_that_is_not_there\nexcept ImportError:\n    pass",
        "try:\n    import a_module_that_is_not_there\nexcept (OSError, Exception):\n    pass",
        "x =",
        "",
    ],
)
def test_allowed(code: str) -> None:
    assert find_unsafe(code) == []


def test_a_guard_covers_its_body_only() -> None:
    code = "try:\n    pass\nexcept ImportError:\n    import a_module_that_is_not_there"
    assert find_unsafe(code)
    code = "try:\n    import a_module_that_is_not_there\nexcept ValueError:\n    pass"
    assert find_unsafe(code)


def test_reasons_name_the_line() -> None:
    (unsafe,) = find_unsafe("x = 1\nimport nope_a, json, nope_b")
    assert unsafe.reason == "module nope_a, nope_b imported on line 2 is not installed"
    (unsafe,) = find_unsafe("x = 1\n!pip install x")
    assert unsafe.reason == "package management on line 2"


def test_removal_keeps_line_numbers() -> None:
    code = (
        "!pip install x\nimport os; import nope_a\n"
        "if True:\n    os.system(\n        'pip install x'\n    )\ny = 1"
    )
    cleaned, removed = remove_unsafe(code)
    assert cleaned == "pass\nimport os; pass\nif True:\n    pass\n\n\ny = 1"
    assert removed == ["!pip install x", "import nope_a", "os.system(\n        'pip install x'\n    )"]
    assert find_unsafe(cleaned) == []


def test_removal_of_nothing() -> None:
    assert remove_unsafe("x = 1\n") == ("x = 1\n", [])


def test_blanking_counts_bytes_not_characters() -> None:
    code = "é = 'ü'; import nope_a; z = 'ß'"
    assert remove_unsafe(code)[0] == "é = 'ü'; pass; z = 'ß'"


TESTS = """\
import unittest
def f(): return 1
assert f() == 1
@decorator
def test_f():
    assert f() == 1
class TestF(unittest.TestCase):
    def test_it(self): pass
def g():
    assert True
    return 2
test_f()
unittest.main()
x = g()
"""


def test_remove_all_tests() -> None:
    code = transform_code(TESTS, "remove_all_tests")
    assert code.splitlines() == [
        "import unittest",
        "def f(): return 1",
        "pass",
        "pass",
        "",
        "",
        "pass",
        "",
        "def g():",
        "    pass",
        "    return 2",
        "pass",
        "pass",
        "x = g()",
    ]


def test_remove_test_items_keeps_assertions() -> None:
    code = transform_code(TESTS, "remove_test_items")
    kept = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert kept == ["assert f() == 1", "assert True"]
    assert "test_f" not in code


def test_transform_arguments() -> None:
    assert transform_code("x =", "remove_all_tests") == "x ="
    assert transform_code(TESTS, None) == TESTS
    with pytest.raises(ValueError, match="expression_transform"):
        transform_code("x", "other")


def test_blanking_nested_statements_once() -> None:
    tree = ast.parse("if a:\n    b()\nc()")
    branch = tree.body[0]
    assert isinstance(branch, ast.If)
    assert blank_statements("if a:\n    b()\nc()", [branch.body[0], branch]) == "pass\n\nc()"
