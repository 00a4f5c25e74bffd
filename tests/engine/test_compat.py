"""The range of vLLM versions, and what the project needs of vLLM, each by name.

`VLLM_SOURCES=WHEEL_OR_FOLDER pytest tests/engine/test_compat.py` asks another vLLM than the installed one.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from aici_vllm.engine import compat
from tests.engine.vllm_internals import MEMBERS, MIRRORED, STATE
from tests.engine.vllm_sources import Sources

PACKAGE = Path(compat.__file__).parents[1]
SOURCES = Sources(Path(os.environ["VLLM_SOURCES"])) if "VLLM_SOURCES" in os.environ else Sources.installed()

INSIDE = ["0.32.0", "0.32.1.post2", "0.33.0", "0.33.4+cpu"]
OUTSIDE = ["0.31.9", "0.34.0", "1.0"]


@pytest.mark.parametrize("version", INSIDE)
def test_versions_inside_the_range(version: str) -> None:
    assert compat.is_supported(Version(version))


@pytest.mark.parametrize("version", OUTSIDE)
def test_versions_outside_are_refused_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compat.is_supported(Version(version))
    monkeypatch.setattr(compat, "installed_version", lambda: Version(version))
    with pytest.raises(compat.UnsupportedVLLM, match=rf">=0.32,<0.34, and {version}"):
        compat.require_supported()


def imports() -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file of the package imports from vLLM, "" for the module itself."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm")


@pytest.mark.parametrize(("module", "name"), sorted(set(imports())))
def test_vllm_still_exports(module: str, name: str) -> None:
    assert SOURCES.has_module(module), f"{module} is gone"
    known = not name or name in SOURCES.names(module) or SOURCES.has_module(f"{module}.{name}")
    assert known, f"{module} has no {name}"


@pytest.mark.parametrize(("owner", "member"), [(o, m) for o, members in MEMBERS.items() for m in members])
def test_vllm_still_has(owner: str, member: str) -> None:
    name, call, wanted = member.rstrip(")").partition("(")
    assert SOURCES.definition(owner) is not None, f"{owner} is gone"
    assert SOURCES.has_member(owner, name), f"{owner} has no {name}"
    if call:
        taken = SOURCES.parameters(f"{owner}.{name}")
        assert taken is not None, f"{owner}.{name} is no function"
        asked = re.findall(r"\w+", wanted)
        assert [p for p in taken if p in asked] == asked, f"{owner}.{name} takes {taken}, not {asked}"


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, names in STATE.items() for n in names])
def test_the_api_server_still_sets(function: str, name: str) -> None:
    body = SOURCES.body(function)
    assert body is not None, f"{function} is gone"
    assert f"state.{name} = " in body, f"{function} sets no {name}"


@pytest.mark.parametrize("path", MIRRORED)
def test_what_the_scheduler_was_written_after_is_there_to_be_read(path: str) -> None:
    assert SOURCES.body(path) is not None


def test_what_is_gone_is_named() -> None:
    assert not SOURCES.has_module("vllm.v1.no_such_module")
    assert SOURCES.definition("vllm.v1.request:NoSuchClass") is None
    assert not SOURCES.has_member("vllm.v1.request:Request", "no_such_member")
    assert SOURCES.parameters("vllm.v1.request:Request.no_such_method") is None
    assert "no_such_name" not in SOURCES.names("vllm.v1.request")
