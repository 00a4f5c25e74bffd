"""The examples run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "recursive" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout


def test_find_codes(tmp_path):
    assert "answer: CODE-0815, CODE-1729, CODE-4711  (2 turns, 22 model calls)" in run(
        "find_codes.py", "--out", str(tmp_path)
    )
    assert (
        json.loads((tmp_path / "call_tree.json").read_text())["result"] == "CODE-0815, CODE-1729, CODE-4711"
    )
    assert "<!doctype html>" in (tmp_path / "call_tree.html").read_text()


def test_nested_children():
    assert "answer: 30" in run("nested_children.py")
