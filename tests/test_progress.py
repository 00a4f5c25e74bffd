"""Progress goes to stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from aici_vllm.progress import Stages

ROOT = Path(__file__).parents[1]

ON_A_TERMINAL = """
from aici_vllm.progress import Stages
with Stages("thing") as stages, stages.stage("making", 1, unit="tensors") as report:
    report(3, 3)
"""


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages("thing") as stages:
        with stages.stage("downloading", 2_000_000, unit="bytes") as report:
            report(1_000_000)
        with stages.stage("making", 1, unit="tensors") as report:
            report(3, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "thing: downloading (2 MB)\nthing: making\n"


def test_bars_on_a_terminal() -> None:
    reader, terminal = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert done.stdout == b""
    assert "thing: making" in shown
    assert "3 of 3 tensors" in shown
