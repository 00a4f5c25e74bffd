"""What to write instead: one sentence for every gap of the sandbox's Python that an error points to."""

from __future__ import annotations

import builtins
import re

MODULES = (
    "math, json, re, random, datetime, time, itertools, functools, collections, bisect, copy, csv, decimal, "
    "hashlib, base64, unicodedata, dataclasses, typing, pathlib, asyncio, string"
)
"""Modules that model code can import, as the prompts name them."""

_MISSING_MODULES = {
    "statistics": "compute it directly: sum(values) / len(values), or sorted(values)[len(values) // 2]",
    "heapq": "use sorted(items, key=...)[:n]",
    "operator": "use a lambda, such as key=lambda item: item[1]",
    "textwrap": "slice the text: [text[i:i + n] for i in range(0, len(text), n)]",
    "io": "use text.splitlines() to read lines, and a list with '\\n'.join(...) to write them",
    "enum": "use plain constants or a dict",
    "numpy": "use lists, sum(), min(), max() and the math module",
    "pandas": "use lists of dicts, the csv module and collections.defaultdict",
    "threading": "pass a list to llm_query_batched or rlm_query_batched, which run in parallel",
    "concurrent": "pass a list to llm_query_batched or rlm_query_batched, which run in parallel",
    "multiprocessing": "pass a list to llm_query_batched or rlm_query_batched, which run in parallel",
    "traceback": "call format_exc(), or print the exception itself: except Exception as error: print(error)",
    "contextlib": "use try / finally",
    "requests": "there is no network; work with `context` and llm_query",
    "urllib": "there is no network; work with `context` and llm_query",
    "openai": "call llm_query(prompt), which needs no import",
}

_HINTS: list[tuple[str, str]] = [
    (
        r"class inheritance and metaclasses",
        "Classes cannot inherit here, so there are no exception subclasses, Enum or NamedTuple either. Write "
        "a plain class or a dict, raise ValueError, or use collections.namedtuple.",
    ),
    (
        r"does not yet support yield",
        "Generators cannot be written here. Collect the items in a list and return the list.",
    ),
    (r"the 'del' statement", "`del` is not available. Use d.pop(key), items.pop(index), or assign None."),
    (
        r"method decorators",
        "@property, @classmethod and @staticmethod are not available. Write an ordinary method or function.",
    ),
    (r"exception groups", "`except*` is not available. Use `except`."),
    (r"type aliases", "`type X = ...` is not available. Leave the alias out."),
    (
        r"'list' object is not an iterator",
        "Generator expressions, map, filter, zip and enumerate give lists here. Index them or use iter().",
    ),
    (
        r"callable replacement is not yet supported in re\.sub",
        "re.sub takes only a string as replacement. Loop over re.finditer(...) and join the pieces.",
    ),
    (
        r"'(str|list|dict|set|tuple|bytes)' object has no attribute '(upper|lower|strip|split|join|append|"
        r"get|format|startswith|endswith|replace|title|add|pop|extend|items|keys|values|count|index|find)'",
        "A method cannot be taken without calling it. Wrap it: lambda item: item.method().",
    ),
    (
        r"type object '\w+' has no attribute",
        "Methods cannot be taken from a type, as in str.lower. Call them on a value: lambda s: s.lower().",
    ),
    (r"has no attribute '__\w+__'", "Dunder attributes are mostly not available."),
    (
        r"cannot import name 'OrderedDict'",
        "OrderedDict is not available. A dict keeps the order of insertion.",
    ),
    (r"cannot import name 'asdict'", "asdict is not available. Build the dict from the fields."),
    (r"cannot import name 'wraps'", "functools.wraps is not available. Leave the decorator out."),
    (r"cannot import name", "The module has no such name here. Write it with plain Python."),
    (
        r"object can't be awaited|a coroutine or an awaitable is required",
        (
            "llm_query and the other functions return their result directly: leave out await and asyncio. "
            "For parallel calls pass a list to llm_query_batched."
        ),
    ),
    (
        r"name '(exit|quit)' is not defined|SystemExit|zero or one string argument",
        "Do not exit. To finish, call FINAL(answer).",
    ),
    (r"name 'input' is not defined", "Nobody is there to type. The data is in `context`."),
    (r"name '(globals|vars|dir)' is not defined", "Use SHOW_VARS() to list the variables."),
    (r"name 'issubclass' is not defined", "Use isinstance(value, type)."),
    (r"name 'bytearray' is not defined", "Use bytes or a list of numbers."),
    (r"name '__import__' is not defined", f"Use an import statement. Available modules: {MODULES}."),
    (
        r"name '(llm_query|llm_query_batched|llm_batch|rlm_query|rlm_query_batched)' is not defined",
        "No language model is connected to this REPL. Work with plain Python on `context`.",
    ),
    (r"name 'context' is not defined", "No context was loaded for this task."),
    (r"_io\.TextIOWrapper' object has no attribute", "Use print(...)."),
    (
        r"PermissionError|os\.environ|is not supported in this environment|NotImplementedError: .*OS",
        "There are no files, no environment variables and no network here. The data is in `context`.",
    ),
    (r"does not yet support", "The sandbox's Python lacks this. Use functions, loops, lists and dicts."),
    (r"Source is too deeply nested", "Split the expression into several statements."),
    (r"maximum recursion depth", "Write the recursion as a loop with a list as the stack."),
]


def hint_for(error: str) -> str | None:
    """What to write instead, for an error `Type: message`; None when Python itself would fail too."""
    missing = re.search(r"No module named '([\w.]+)'", error)
    if missing:
        instead = _MISSING_MODULES.get(missing.group(1).split(".")[0], "write it with plain Python")
        return f"That module is not available; {instead}. Available modules: {MODULES}."
    for pattern, sentence in _HINTS:
        if re.search(pattern, error):
            return sentence
    return _hint_for_missing_builtin(error)


def _hint_for_missing_builtin(error: str) -> str | None:
    """A hint where ordinary Python has the name or the method, and the sandbox has not."""
    name = re.search(r"name '(\w+)' is not defined", error)
    if name and hasattr(builtins, name.group(1)):
        return f"The built-in `{name.group(1)}` is not available here. Write it with plain Python."
    method = re.search(r"'(\w+)' object has no attribute '(\w+)'", error)
    if method and hasattr(getattr(builtins, method.group(1), None), method.group(2)):
        return f"`{method.group(1)}.{method.group(2)}` is not available here. Write it with plain Python."
    if re.search(r"module '\w+' has no attribute", error):
        return "The module has no such name here. Write it with plain Python."
    own = re.search(r"object of type '(\w+)' has no len|instances of '(\w+)'", error)
    if own and not hasattr(builtins, own.group(1) or own.group(2)):
        return "Not all special methods of a class work here. Write an ordinary method and call it."
    return None
