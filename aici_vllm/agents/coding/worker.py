"""The program that runs code in a process of its own. It imports only the standard library.

Started as `python -I worker.py FD`: reads a JSON job from standard input, runs the parts of the job one
after the other in one fresh `__main__` module, and writes one line of JSON about the outcome to file
descriptor FD.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import linecache
import os
import sys
import threading
import traceback
import types
from typing import Any

CODE_FILENAME = "__code_string_eval"
MAX_TEXT = 100_000
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def main() -> None:
    """Run the job and report."""
    channel = int(sys.argv[1])
    os.set_inheritable(channel, False)
    job = json.loads(sys.stdin.buffer.read())
    # The code sees a program without arguments, and must not wait for input that cannot come.
    sys.argv = ["main.py"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _limit_memory(job["memory_limit"])
    report = _run(job)
    for stream in (sys.stdout, sys.stderr):
        # The code may have closed or replaced its streams.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    data = json.dumps(report).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]
    os._exit(0)


def _limit_memory(limit: int | None) -> None:
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    module = types.ModuleType("__main__")
    builtin_names = set(vars(module)) | {"__builtins__"}
    # Dataclasses and pickle look their module up here. The old one must live on: this function belongs to it.
    job["worker_module"] = sys.modules["__main__"]
    sys.modules["__main__"] = module
    value: Any = None
    try:
        for filename, text in job["parts"]:
            last = job["last_value"] and filename == CODE_FILENAME
            result = _execute(filename, text, vars(module), last)
            value = result if last else value
        _join_threads()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            pass
        else:
            return {"error": _describe(error), "output": None}
    if job["last_value"]:
        return {"error": None, "output": _plain(value)}
    names = {name: _plain(item) for name, item in vars(module).items() if name not in builtin_names}
    return {"error": None, "output": names}


def _execute(filename: str, text: str, namespace: dict[str, Any], last_value: bool) -> Any:
    """Run one part; with `last_value` return the value of its last statement if that is an expression."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    tree = ast.parse(text, filename)
    final = tree.body.pop() if last_value and tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
    if not isinstance(final, ast.Expr):
        return None
    return eval(compile(ast.Expression(final.value), filename, "eval", dont_inherit=True), namespace)


def _join_threads() -> None:
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def _plain(value: Any) -> dict[str, Any]:
    """A value as text: `literal` says whether `ast.literal_eval` restores it."""
    literal = _is_literal(value, 20)
    try:
        text = repr(value)
    except Exception as error:
        return {
            "literal": False,
            "text": f"<{type(value).__name__} whose repr raised {type(error).__name__}>",
        }
    return {"literal": literal and len(text) <= MAX_TEXT, "text": text[:MAX_TEXT]}


def _is_literal(value: Any, depth: int) -> bool:
    if type(value) in _PLAIN:
        return True
    if depth == 0 or type(value) not in (list, tuple, set, dict):
        return False
    items = [*value.keys(), *value.values()] if type(value) is dict else value
    return all(_is_literal(item, depth - 1) for item in items)


def _describe(error: BaseException) -> dict[str, Any]:
    args = list(error.args)
    plain = all(type(arg) in (str, int, float, bool, type(None)) for arg in args)
    return {
        "type": type(error).__name__,
        "builtin": getattr(builtins, type(error).__name__, None) is type(error),
        "message": _text_of(error),
        "args": [str(arg)[:MAX_TEXT] if isinstance(arg, str) else arg for arg in args] if plain else None,
        "name": error.name if isinstance(error, NameError | ImportError) else None,
        "lines": _lines(error),
        "traceback": "".join(traceback.format_exception(error, limit=-20))[:MAX_TEXT],
        "failures": _test_failures(error),
    }


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except Exception as broken:
        return f"<the message cannot be printed: {type(broken).__name__}>"


def _lines(error: BaseException) -> list[int]:
    """Lines of the code that took part, each once: where it failed first, then its callers."""
    frames = [line for frame, line in traceback.walk_tb(error.__traceback__) if _is_code(frame)]
    syntax = [error.lineno] if isinstance(error, SyntaxError) and error.filename == CODE_FILENAME else []
    return list(dict.fromkeys(line for line in [*syntax, *reversed(frames)] if line))


def _is_code(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename == CODE_FILENAME


def _test_failures(error: BaseException) -> list[list[str]] | None:
    """Failed tests if `unittest.main()` ended the code, as pairs of the test's id and its last error line."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        result: Any = getattr(frame.f_locals.get("self"), "result", None)
        if isinstance(error, SystemExit) and "unittest" in sys.modules and hasattr(result, "failures"):
            found = [*result.failures, *result.errors]
            return [[test.id(), text.strip().splitlines()[-1]] for test, text in found]
    return None


if __name__ == "__main__":
    main()
