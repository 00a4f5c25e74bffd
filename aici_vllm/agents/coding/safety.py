"""What code is refused, or cut out, before it runs. Textual checks against accidents, not a sandbox."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_VERB = r"(?:install|uninstall|add|remove|update|upgrade|sync)\b"
_TOOL = r"(?:pip[\d.]*|conda|mamba|micromamba|uv|poetry|pipx|pdm|easy_install|apt|apt-get|brew)"
_SHELL_LINE = re.compile(rf"^\s*[!%]?\s*(?:sudo\s+)?(?:python[\d.]*\s+-m\s+)?{_TOOL}\s(?:.*\s)?{_VERB}")
_SHELL_TEXT = re.compile(rf"(?:^|[\s/;&|]){_TOOL}\s(?:.*\s)?{_VERB}")
_PROCESS_CALLS = frozenset(
    [
        "system",
        "popen",
        "run",
        "call",
        "check_call",
        "check_output",
        "Popen",
        "getoutput",
        "getstatusoutput",
        "execv",
        "execve",
        "execvp",
        "spawnv",
        "spawnl",
        "execl",
        "execlp",
    ]
)
_PACKAGE_MODULES = frozenset({"pip", "conda", "ensurepip", "easy_install"})
_IMPORT_GUARDS = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})

EXPRESSION_TRANSFORMS = ("remove_all_tests", "remove_test_items")


@dataclass(frozen=True)
class Unsafe:
    """One refused place: why, and the statement or (in code that does not parse) the line."""

    reason: str
    line: int
    statement: ast.stmt | None = None


def find_unsafe(code: str) -> list[Unsafe]:
    """Package management and imports of modules that are not installed, in order of lines."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [
            Unsafe(f"package management on line {number}", number)
            for number, line in enumerate(code.split("\n"), start=1)
            if _SHELL_LINE.match(line)
        ]
    return [
        Unsafe(reason, statement.lineno, statement)
        for statement, guarded in _statements(tree.body, guarded=False)
        if (reason := _refusal(statement, guarded))
    ]


def remove_unsafe(code: str) -> tuple[str, list[str]]:
    """The code with every refused place replaced by `pass`, and the text of what was removed.

    Lines keep their numbers. Shell lines go first, because code with them does not parse.
    """
    removed: list[str] = []
    lines = code.split("\n")
    for unsafe in find_unsafe(code):
        if unsafe.statement is None:
            line = lines[unsafe.line - 1]
            removed.append(line.strip())
            lines[unsafe.line - 1] = line[: len(line) - len(line.lstrip())] + "pass"
    code = "\n".join(lines)
    statements = [unsafe.statement for unsafe in find_unsafe(code) if unsafe.statement is not None]
    removed += [ast.get_source_segment(code, statement) or "" for statement in statements]
    return blank_statements(code, statements), removed


def transform_code(code: str, transform: str | None) -> str:
    """The code without its tests, lines keeping their numbers; code that does not parse stays.

    "remove_test_items" cuts out test functions, test classes and the calls that run them; "remove_all_tests"
    also assertions. Raises ValueError for another name.
    """
    if transform is None:
        return code
    if transform not in EXPRESSION_TRANSFORMS:
        raise ValueError(
            f"expression_transform must be None or one of {EXPRESSION_TRANSFORMS}, got {transform!r}."
        )
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    asserts = transform == "remove_all_tests"
    found = _statements(tree.body, guarded=False)
    tests = [node for node, _ in found if _is_test(node) or (asserts and isinstance(node, ast.Assert))]
    return blank_statements(code, tests)


def blank_statements(code: str, statements: Iterable[ast.stmt]) -> str:
    """The code with `pass` in place of each statement; those inside another one go with it."""
    lines = [line.encode() for line in code.split("\n")]
    outer = _outermost(statements)
    for statement in reversed(outer):
        start, column = _start(statement)
        end, end_column = statement.end_lineno or start, statement.end_col_offset or 0
        head, tail = lines[start - 1][:column], lines[end - 1][end_column:]
        filler = [b""] * (end - start)
        lines[start - 1 : end] = [head + b"pass" + tail, *filler]
    return b"\n".join(lines).decode()


def _outermost(statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    """The statements in order of position, without those that lie inside another."""
    outer: list[ast.stmt] = []
    for statement in sorted(statements, key=_start):
        end = (outer[-1].end_lineno, outer[-1].end_col_offset) if outer else (0, 0)
        if _start(statement) >= end:
            outer.append(statement)
    return outer


def _start(statement: ast.stmt) -> tuple[int, int]:
    decorators = getattr(statement, "decorator_list", [])
    if not decorators:
        return statement.lineno, statement.col_offset
    return min(decorator.lineno for decorator in decorators), statement.col_offset


def _statements(body: Iterable[ast.stmt], guarded: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement under `body`, in order, and whether a `try` around it catches failed imports."""
    stack = [(statement, guarded) for statement in reversed(list(body))]
    while stack:
        statement, inside = stack.pop()
        yield statement, inside
        nested: list[tuple[ast.stmt, bool]] = []
        for name, value in ast.iter_fields(statement):
            catches = name == "body" and isinstance(statement, ast.Try) and _catches_imports(statement)
            for child in value if isinstance(value, list) else []:
                if isinstance(child, ast.stmt):
                    nested.append((child, inside or catches))
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    nested += [(grandchild, inside) for grandchild in child.body]
        stack.extend(reversed(nested))


def _catches_imports(statement: ast.Try) -> bool:
    for handler in statement.handlers:
        if handler.type is None:
            return True
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if any(isinstance(kind, ast.Name) and kind.id in _IMPORT_GUARDS for kind in types):
            return True
    return False


def _refusal(statement: ast.stmt, guarded: bool) -> str | None:
    """Why the statement itself (not what is nested in it) is refused, or None."""
    modules = _imported_modules(statement)
    if any(module in _PACKAGE_MODULES for module in modules):
        return f"package management on line {statement.lineno}"
    missing = [] if guarded else [module for module in modules if not _is_installed(module)]
    if missing:
        return f"module {', '.join(missing)} imported on line {statement.lineno} is not installed"
    if any(_manages_packages(call) for call in _own_calls(statement)):
        return f"package management on line {statement.lineno}"
    return None


def _imported_modules(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
        return [statement.module.partition(".")[0]]
    return []


def _is_installed(module: str) -> bool:
    if module in sys.stdlib_module_names or module == "__main__":
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _own_calls(statement: ast.stmt) -> Iterator[ast.Call]:
    """Calls in the expressions of a statement, not in statements nested in it."""
    stack: list[ast.AST] = [statement]
    while stack:
        for child in ast.iter_child_nodes(stack.pop()):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                continue
            if isinstance(child, ast.Call):
                yield child
            stack.append(child)


def _manages_packages(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in _PROCESS_CALLS:
        return False
    words = [
        node.value
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return bool(_SHELL_TEXT.search(" ".join(words)))


def _is_test(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return statement.name.startswith("test_")
    if isinstance(statement, ast.ClassDef):
        return statement.name.startswith("Test") or any(
            _dotted(base).endswith("TestCase") for base in statement.bases
        )
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        name = _dotted(statement.value.func)
        return name in ("unittest.main", "pytest.main") or name.startswith("test_")
    return False


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
