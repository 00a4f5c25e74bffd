"""What is known of a script without running it: whether the sandbox takes it, and if it takes text back.

Everything here is linear in the source and never executes it, so it is safe to do for whoever asks.
"""

import ast
import enum
import functools
import re
import unicodedata
from collections.abc import Iterator

from aici_vllm.controller.errors import ScriptError
from aici_vllm.controller.limits import Limits

MODULES = frozenset(
    [
        "asyncio",
        "base64",
        "binascii",
        "bisect",
        "collections",
        "copy",
        "csv",
        "dataclasses",
        "datetime",
        "decimal",
        "functools",
        "hashlib",
        "itertools",
        "json",
        "math",
        "os",
        "os.path",
        "pathlib",
        "posixpath",
        "random",
        "re",
        "sys",
        "time",
        "tomllib",
        "typing",
        "unicodedata",
    ]
)
"""What a script can import beside aici, as far as the sandbox has it."""

AICI_MODULES = frozenset(["aici", "aici_vllm", "aici_vllm.aici", "pyaici", "pyaici.server"])

NATIVE = "pyaici.server_native"

ABSENT = {
    "register": "give aici.start() a coroutine",
    "self_seq_id": "aici.fork() returns the number of the branch",
    "is_server_side": "a script always runs in the server, so leave the question out",
}
"""Words of AICI's native module that there are none of here, and what to write instead."""

MOST_TOKENS = 10_000
"""Words and signs outside strings. Python's parser holds everything up for about 3 us on each."""

MOST_FIELD_WORK = 50_000_000
"""Sum over f-strings of fields times length: Python's parser takes that many steps, about 0.3 ns each."""

SMALL = 1 << 13
"""Characters below which a source is parsed without a look at its cost."""


class TakesBack(enum.Enum):
    """Which text a script could take back after it was written."""

    NOTHING = enum.auto()
    MARKED = enum.auto()
    """What stands behind a label of its own."""
    ANYTHING = enum.auto()


@functools.lru_cache(maxsize=32)
def check_source(source: str, limits: Limits) -> None:
    """Look at a script before anything runs.

    Raises:
        ScriptError: what the sandbox would not take, where, and what to write instead.
    """
    for error in _errors(source, limits):
        raise error


def all_errors(source: str, limits: Limits) -> list[ScriptError]:
    """Everything that `check_source` could raise for a script, by line; what is no Python has one."""
    try:
        found = list(_errors(source, limits))
    except ScriptError as error:
        found = [error]
    return sorted(found, key=lambda error: error.line or 0)


def _errors(source: str, limits: Limits) -> Iterator[ScriptError]:
    """What the sandbox would not take. Raises what makes it pointless to look any further."""
    _check_size(source, limits)
    _check_cost(source)
    tree = _parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _SUSPECTS) or (isinstance(node, ast.Attribute) and node.attr in ABSENT):
            for message in _refusals(node):
                yield ScriptError(
                    message, node.target.lineno if isinstance(node, ast.comprehension) else node.lineno
                )
    yield from _start_errors(tree)


# Size and syntax.


def _check_size(source: str, limits: Limits) -> None:
    # A character takes one byte or more: long sources need no encoding to be refused.
    size = len(source)
    if size <= limits.source_bytes:
        size = len(source.encode(errors="surrogatepass"))
    if size > limits.source_bytes:
        raise ScriptError(f"the script has {size} bytes; a script may have {limits.source_bytes}")


_STRING_OR_COMMENT = re.compile(
    r"""\#[^\n]*+
    | (?P<prefix>(?<!\w)[a-zA-Z]{0,2})
      (?: \"\"\" (?:[^"\\]++ | \\. | "(?!""))*+ (?:\"\"\")?
        | \'\'\' (?:[^'\\]++ | \\. | '(?!''))*+ (?:\'\'\')?
        | "(?:[^"\\\n]++ | \\.)*+ "?
        | '(?:[^'\\\n]++ | \\.)*+ '? )""",
    re.VERBOSE | re.DOTALL,
)
_TOKEN = re.compile(r"\w++|[^\w\s]")


def _check_cost(source: str) -> None:
    """Refuse what Python's parser would take seconds for."""
    if len(source) < SMALL:
        return
    work = tokens = 0
    for match in _STRING_OR_COMMENT.finditer(source):
        tokens += match["prefix"] is not None
        if "f" in (match["prefix"] or "").lower() and (fields := match[0].count("{")):
            work += fields * len(match[0])
            # What stands in the fields is parsed, and where they end is not known yet.
            tokens += sum(1 for _ in _TOKEN.finditer(match[0]))
    if work > MOST_FIELD_WORK:
        raise ScriptError("the script's f-strings are too long: split them, or use str.format")
    tokens += sum(1 for _ in _TOKEN.finditer(_STRING_OR_COMMENT.sub(" ", source)))
    if tokens > MOST_TOKENS:
        raise ScriptError(
            f"the script has about {tokens} words and signs outside strings (f-strings count), and may have "
            f"{MOST_TOKENS}: put data into controller_arg, or into strings that json.loads reads"
        )


def _parse(source: str) -> ast.Module:
    if "\0" in source:
        raise ScriptError("the script holds a null byte", source.count("\n", 0, source.index("\0")) + 1)
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ScriptError(f"SyntaxError: {error.msg}", error.lineno) from None
    except (RecursionError, MemoryError):
        raise ScriptError(
            "the script is nested too deeply for Python's parser: break long expressions up"
        ) from None
    except UnicodeEncodeError as error:
        line = source.count("\n", 0, error.start) + 1
        raise ScriptError("the script holds half a character (a lone surrogate)", line) from None


# What the sandbox cannot run.

_SUSPECTS = (
    ast.Yield,
    ast.YieldFrom,
    ast.ClassDef,
    ast.Delete,
    ast.AsyncFor,
    ast.AsyncWith,
    ast.comprehension,
    ast.TryStar,
    ast.AugAssign,
    ast.Import,
    ast.ImportFrom,
    ast.Raise,
)
"""Kinds of node that `_refusals` has a word on."""


def _refusals(node: ast.AST) -> Iterator[str]:
    """Why the sandbox does not take `node`, and what to write instead."""
    match node:
        case ast.Yield() | ast.YieldFrom():
            yield "the sandbox has no generators (yield): collect the items in a list and return it"
        case ast.ClassDef():
            yield from _class_refusals(node)
        case ast.Delete():
            yield "the sandbox has no del: use list.pop, dict.pop, or assign None"
        case ast.AsyncFor():
            yield "the sandbox has no async for: use a plain for, with await inside"
        case ast.AsyncWith():
            yield "the sandbox has no async with: use a plain with, or try and finally, with await inside"
        case ast.comprehension(is_async=1):
            yield "the sandbox has no async comprehensions: use a for loop with await inside"
        case ast.TryStar():
            yield "the sandbox has no except*: use except"
        case ast.AugAssign(op=ast.MatMult()):
            yield "the sandbox has no @=: write a = a @ b"
        case ast.Raise(exc=ast.Call(args=[_, _, *_])):
            yield "the sandbox's exceptions take one string: write it as an f-string"
        case ast.Import():
            for alias in node.names:
                yield from _import_refusals(alias.name)
        case ast.ImportFrom():
            yield from _import_from_refusals(node)
        case ast.Attribute(value=ast.Name(id="aici"), attr=name):
            yield _instead_of_word(name)


def _class_refusals(node: ast.ClassDef) -> Iterator[str]:
    if node.bases or node.keywords:
        bases = [getattr(base, "attr", getattr(base, "id", "")) for base in node.bases]
        yield f"the sandbox has no class inheritance: {_instead_of_bases(node.name, bases)}"
    for statement in node.body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if statement.decorator_list:
                    yield f"the sandbox has no decorated methods: write {statement.name} as a plain one"
            case ast.Pass() | ast.AnnAssign(target=ast.Name()) | ast.Assign(targets=[ast.Name()]):
                pass
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                yield (
                    "a class in the sandbox holds methods and `name = value` only: "
                    f"move line {statement.lineno} out of class {node.name}"
                )


def _instead_of_bases(name: str, bases: list[str]) -> str:
    if any(base.endswith(("Exception", "Error")) for base in bases):
        return "raise one of Python's own exceptions, such as ValueError"
    if "NextToken" in bases:
        return f"write `class {name}:`; any object with a mid_process method can be awaited"
    if "Constraint" in bases:
        return f"write `class {name}:` with eos_allowed, eos_forced, append_token and allow_tokens"
    return f"write `class {name}:`, and hold what it would inherit in an attribute"


def _instead_of_word(name: str) -> str:
    return f"aici has no {name}() here: {ABSENT[name]}"


def _import_refusals(module: str) -> Iterator[str]:
    if module == NATIVE:
        yield f"there is no {NATIVE} here: import pyaici.server, which has its words"
    elif module not in MODULES | AICI_MODULES:
        yield f"the sandbox has no module {module!r}; it has aici, {', '.join(sorted(MODULES))}"


def _import_from_refusals(node: ast.ImportFrom) -> Iterator[str]:
    if node.level:
        yield "a script has no package: write the import without the leading dots"
    elif any(alias.name == "*" for alias in node.names):
        yield f"the sandbox has no `import *`: name what you need from {node.module}"
    elif node.module != "__future__":
        module = node.module or ""
        names = [alias.name for alias in node.names]
        native = module == "pyaici" and "server_native" in names
        yield from _import_refusals(NATIVE if native else module)
        if module in AICI_MODULES:
            yield from map(_instead_of_word, filter(ABSENT.__contains__, names))


def _start_errors(tree: ast.Module) -> Iterator[ScriptError]:
    imports, starts = False, False
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imports |= any(alias.name in AICI_MODULES for alias in names)
            case ast.ImportFrom(module=module):
                imports |= module in AICI_MODULES
            case (
                ast.Call(func=ast.Attribute(attr="start" | "test"))
                | ast.Call(func=ast.Name(id="start" | "test"))
            ):
                starts = True
    if not imports:
        yield ScriptError("the script never imports aici: begin it with `import aici`")
    if not starts:
        yield ScriptError("the script never calls aici.start(...): end it with `aici.start(main())`")


# What a script can do.

_STRING = r"""[a-zA-Z]{0,2}(?:"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+')"""
_PLAIN_FIXED_TEXT = re.compile(rf"FixedTokens\s*+\(\s*+(?:(?:{_STRING}\s*+)++|[\w.]++)\s*+\)")
SEARCHED = 1 << 14
"""Characters that are looked through: each 1,024 of them hold the engine up for about 60 us."""

_ANYTHING = ("Splice", "MidProcessResult", "NextToken", "eval", "exec", "getattr")
"""What takes back text without a label, or could reach what does."""

_NAMES_ANYTHING = re.compile(rf"\b(?:{'|'.join(_ANYTHING)})\b")
_NAMES_MARKED = re.compile(r"FixedTokens|\bfollowing\b")


def takes_back(source: str) -> TakesBack:
    """Which text a script could take back, as far as its words tell: too much at worst. Linear, no parser.

    It takes back nothing when all its fixed text is written as `FixedTokens("text")` or `FixedTokens(name)`,
    with no second argument, and nothing else in it could reach the words that take back.
    """
    if len(source) > SEARCHED:
        return TakesBack.ANYTHING if any(word in source for word in _ANYTHING) else TakesBack.MARKED
    if not source.isascii():
        source = unicodedata.normalize("NFKC", source)
    if _NAMES_ANYTHING.search(source):
        return TakesBack.ANYTHING
    marked = _NAMES_MARKED.search(_PLAIN_FIXED_TEXT.sub(_without_word, source))
    return TakesBack.MARKED if marked else TakesBack.NOTHING


def _without_word(plain: re.Match[str]) -> str:
    # An f-string can hold another call.
    return plain[0].removeprefix("FixedTokens")
