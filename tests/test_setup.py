"""The set-up script, short of installing: every `make` target does that."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "setup.py"


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with this project's set-up script and a project of another name."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.py").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    return tmp_path


def load(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", checkout / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_unknown_build_is_bad_usage() -> None:
    done = run(SCRIPT, "rocm")
    assert (done.returncode, done.stderr) == (2, "usage: setup.py [cpu|cuda]\n")


def test_a_true_stamp_means_nothing_to_do(checkout: Path) -> None:
    script = load(checkout)
    script.VENV.mkdir()
    script.STAMP.write_text(script.json.dumps(script.what_to_install("cpu")))
    done = run(checkout / "scripts" / "setup.py", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in script.VENV.iterdir()] == [script.STAMP.name]


def test_the_stamp_follows_the_project_and_the_build(checkout: Path) -> None:
    script = load(checkout)
    before = script.what_to_install("cpu")
    assert before != script.what_to_install("cuda")
    (checkout / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    assert before != script.what_to_install("cpu")


@pytest.mark.parametrize("content", [None, "", "{", "\x00"])
def test_a_broken_stamp_is_no_stamp(checkout: Path, content: str | None) -> None:
    script = load(checkout)
    script.VENV.mkdir()
    if content is not None:
        script.STAMP.write_text(content)
    assert script.read_stamp() is None
