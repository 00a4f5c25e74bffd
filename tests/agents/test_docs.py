"""The Python blocks of docs/agents.md run in order, and the tree printed there is the one they grow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from aici_vllm.agents.coding.blocks import fenced_blocks

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"


def test_the_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = fenced_blocks(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 8
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = re.sub(r"id: \d+", "id", capsys.readouterr().out)
    shown = [line.removeprefix("# ") for line in blocks[0].splitlines() if line.startswith("# ")]
    assert re.sub(r"id: \d+", "id", "\n".join(shown)) in printed
