"""The two worked examples: the trees they grow are the published ones, and they run as programs."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from aici_vllm.agents import AICall, AIMessage, PostOrderDFS, ScriptedModel, last_output, print_samples

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "agents"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree_text(call: AICall) -> str:
    file = io.StringIO()
    print_samples(call.samples, file=file)
    return re.sub(r"id: \d+", "id", file.getvalue())


COLOURS = """\
SampleNode(id, stats: 6/12, score: 0.5, length: 2)
├─ SampleNode(id, stats: 5/8, score: 1.41, length: 4)
│  ├─ SampleNode(id, stats: 3/4, score: 1.77, length: 6)
│  │  ├─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
│  │  └─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
│  └─ SampleNode(id, stats: 1/2, score: 1.94, length: 5)
└─ SampleNode(id, stats: 1/4, score: 1.36, length: 4)
   ├─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
   └─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
"""

NUMBERS = """\
SampleNode(id, stats: 6/14, score: 0.43, length: 2)
├─ SampleNode(id, stats: 5/10, score: 1.23, length: 4)
│  ├─ SampleNode(id, stats: 1/4, score: 1.32, length: 6)
│  │  ├─ SampleNode(id, stats: 0/1, score: 1.67, length: 7)
│  │  └─ SampleNode(id, stats: 0/1, score: 1.67, length: 7)
│  └─ SampleNode(id, stats: 3/4, score: 1.82, length: 6)
│     ├─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
│     └─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
└─ SampleNode(id, stats: 1/4, score: 1.4, length: 4)
   ├─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
   └─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
"""


def test_the_colour_game() -> None:
    colour_game = example("colour_game")
    out = colour_game.play(ScriptedModel(colour_game.SCRIPT))
    assert tree_text(out) == COLOURS
    assert last_output(out) == "yellow"
    answers = [
        node.data[-1].content for node in PostOrderDFS(out.samples) if isinstance(node.data[-1], AIMessage)
    ]
    assert answers == ["yellow", "yellow", "red", "blue", "blue"]


def test_the_number_guesser() -> None:
    number_guesser = example("number_guesser")
    model = ScriptedModel(number_guesser.SCRIPT)
    out = number_guesser.llm_guesser(33, model)
    assert tree_text(out) == NUMBERS
    assert last_output(out) == "33"
    assert (out.config.calls, out.config.retries) == (10, 4)
    first = next(PostOrderDFS(out.samples))
    assert [m.content for m in first.data if isinstance(m, AIMessage)] == ["50", "35", "37"]
    assert "Your guess of 35 is wrong, it's 2 numbers away." in model.calls[-1].prompt[-1].content
    with pytest.raises(ValueError):
        number_guesser.llm_guesser(101, model)


def test_the_number_guesser_with_a_model_that_talks() -> None:
    number_guesser = example("number_guesser")
    out = number_guesser.llm_guesser(33, ScriptedModel(["I guess 50", "fifty", "50", "x"] + ["35"] * 8))
    assert out.success is False
    assert out.config.retries == 5


@pytest.mark.parametrize(
    ("name", "answer"), [("colour_game", "Answer: yellow"), ("number_guesser", "Guess: 33")]
)
def test_they_run_as_programs(name: str, answer: str, tmp_path: Path) -> None:
    page = tmp_path / "tree.html"
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / f"{name}.py"), "--html", str(page)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
        timeout=60,
    )
    assert answer in done.stdout
    assert "└─ SampleNode(" in done.stdout
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
