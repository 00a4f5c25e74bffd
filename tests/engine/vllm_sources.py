"""vLLM's sources, read without importing them: what modules define, classes have, and functions take."""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """The Python files of one vLLM: those of a wheel, or of the folder that has `vllm` in it."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self._wheel = zipfile.ZipFile(where) if where.suffix == ".whl" else None
        self._files = set(self._wheel.namelist()) if self._wheel else set()
        self.module = cache(self._module)

    @classmethod
    def installed(cls) -> Sources:
        """Those of the vLLM that `import vllm` would give."""
        spec = importlib.util.find_spec("vllm")
        assert spec is not None and spec.origin is not None
        return cls(Path(spec.origin).parents[1])

    def has_module(self, name: str) -> bool:
        """Whether there is a module or package of that name."""
        return self._path(name) is not None

    def names(self, module: str) -> set[str]:
        """What `from module import …` finds, its submodules left out."""
        found = set[str]()
        for statement in _top_level(self.module(module).body):
            if isinstance(statement, Definition):
                found.add(statement.name)
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name.split(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                found |= set(_assigned(statement))
        # A package that finds its names when they are asked for lists them as strings.
        if "__getattr__" in found:
            found |= {node.value for node in ast.walk(self.module(module)) if _is_text(node)}
        return found

    def definition(self, path: str) -> Definition | None:
        """A class, a function or a method: `package.module:Class.method`, inherited ones too."""
        module, _, dotted = path.partition(":")
        if not self.has_module(module):
            return None
        name, _, rest = dotted.partition(".")
        found = self._top_definition(module, name)
        return self._member(module, found, rest) if rest and isinstance(found, ast.ClassDef) else found

    def has_member(self, path: str, name: str) -> bool:
        """Whether a class defines, declares or sets `name`, or inherits it."""
        module, _, class_name = path.partition(":")
        found = self._top_definition(module, class_name) if self.has_module(module) else None
        return isinstance(found, ast.ClassDef) and any(
            name in _members(c) for _, c in self._line(module, found)
        )

    def parameters(self, path: str) -> list[str] | None:
        """The names that a function takes, `self` among them; None if there is no such function."""
        found = self.definition(path)
        if found is None or isinstance(found, ast.ClassDef):
            return None
        given = found.args
        return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]

    def body(self, path: str) -> str | None:
        """A definition as text, its comments and layout left out; None if there is none."""
        found = self.definition(path)
        return None if found is None else ast.unparse(found)

    def _module(self, name: str) -> ast.Module:
        path = self._path(name)
        if path is None:
            raise LookupError(f"{self.where} has no module {name}")
        text = self._wheel.read(path).decode() if self._wheel else (self.where / path).read_text("utf-8")
        return ast.parse(text)

    def _path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if path in self._files or (self._wheel is None and (self.where / path).is_file()):
                return path
        return None

    def _top_definition(self, module: str, name: str) -> Definition | None:
        """The class or function that a module calls `name`, wherever it comes from."""
        for statement in _top_level(self.module(module).body):
            if isinstance(statement, Definition) and statement.name == name:
                return statement
        origin = self._origin(module, name)
        return None if origin is None else self._top_definition(*origin)

    def _origin(self, module: str, name: str) -> tuple[str, str] | None:
        """The module that `name` was imported from, and its name there."""
        for statement in _top_level(self.module(module).body):
            if isinstance(statement, ast.ImportFrom) and self.has_module(statement.module or ""):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return (statement.module or "", alias.name)
        return None

    def _member(self, module: str, owner: ast.ClassDef, name: str) -> Definition | None:
        for _, ancestor in self._line(module, owner):
            for statement in ancestor.body:
                if isinstance(statement, Definition) and statement.name == name:
                    return statement
        return None

    def _line(self, module: str, found: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those it inherits from, as far as they are vLLM's own."""
        yield module, found
        for base in found.bases:
            if not isinstance(base, ast.Name):
                continue
            home, name = self._origin(module, base.id) or (module, base.id)
            parent = self._top_definition(home, name)
            if isinstance(parent, ast.ClassDef) and parent is not found:
                yield from self._line(home, parent)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if` and `try` too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            for nested in (statement.body, statement.orelse, getattr(statement, "finalbody", [])):
                yield from _top_level(nested)


def _members(found: ast.ClassDef) -> set[str]:
    names = set[str]()
    for statement in found.body:
        if isinstance(statement, Definition):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= set(_assigned(statement))
    for node in ast.walk(found):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def _assigned(statement: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
