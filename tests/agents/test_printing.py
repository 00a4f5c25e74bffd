"""The printed tree, character by character, and the rich tree."""

from __future__ import annotations

import io
import random

import pytest

from aici_vllm.agents import (
    UCT,
    SampleNode,
    ThompsonSampling,
    backpropagate,
    expand,
    print_samples,
    samples_tree,
)


def small_tree() -> SampleNode:
    root = SampleNode([], id=10_001)
    root.children = [SampleNode([], id=10_002, parent=root), SampleNode("text", id=10_004, parent=root)]
    left, right = root.children
    left.children = [SampleNode([1], id=10_003, parent=left)]
    backpropagate(left, 1)
    backpropagate(right, 0)
    backpropagate(left.children[0], 1)
    return root


EXPECTED = """\
SampleNode(id: 10001, stats: 2/3, score: 0.67, length: 0)
├─ SampleNode(id: 10002, stats: 2/2, score: 2.05, length: 0)
│  └─ SampleNode(id: 10003, stats: 1/1, score: 2.18, length: 1)
└─ SampleNode(id: 10004, stats: 0/1, score: 1.48)
"""


def printed(node: SampleNode, **options: object) -> str:
    file = io.StringIO()
    print_samples(node, file=file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_exact() -> None:
    assert printed(small_tree()) == EXPECTED
    assert printed(small_tree(), scoring=UCT(0.0)).splitlines()[1] == (
        "├─ SampleNode(id: 10002, stats: 2/2, score: 1.0, length: 0)"
    )


def test_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_samples(small_tree())
    assert capsys.readouterr().out == EXPECTED


def test_scores_are_printed_in_their_shortest_form() -> None:
    root = SampleNode([], id=10_011)
    root.wins, root.visits = 7, 5
    assert printed(root) == "SampleNode(id: 10011, stats: 7/5, score: 1.4, length: 0)\n"
    root.wins, root.visits = 0, 0
    assert "score: 0.0," in printed(root)


def test_prefixes_below_last_and_other_children() -> None:
    root = SampleNode(None, id=10_020)
    for number in (1, 2):
        child = SampleNode(None, id=10_020 + number * 10, parent=root)
        root.children.append(child)
        for below in (1, 2):
            child.children.append(SampleNode(None, id=child.id + below, parent=child))
    heads = [line.split("SampleNode")[0] for line in printed(root).splitlines()]
    assert heads == ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", "   ├─ ", "   └─ "]


def test_depth_limit() -> None:
    lines = printed(small_tree(), max_depth=1).splitlines()
    assert [line.split("SampleNode")[0] for line in lines] == ["", "├─ ", "│  ⋮", "│  ", "└─ "]
    assert printed(small_tree(), max_depth=0).splitlines()[1:] == ["⋮", ""]
    assert printed(small_tree(), max_depth=2) == EXPECTED


def test_thompson_scores_follow_the_rng() -> None:
    root = small_tree()
    options = {"scoring": ThompsonSampling()}
    first = printed(root, rng=random.Random(1), **options)
    assert first == printed(root, rng=random.Random(1), **options)
    assert first != printed(root, rng=random.Random(2), **options)


class CountingFile(io.StringIO):
    """Counts what is written and keeps none of it."""

    lines = 0
    last = ""

    def write(self, text: str) -> int:
        self.lines += text.count("\n")
        self.last = text
        return len(text)


def test_a_deep_chain_prints_without_a_limit() -> None:
    root = node = SampleNode([])
    for _ in range(9_999):
        node = expand(node, [])
    file = CountingFile()
    print_samples(root, file=file)
    assert file.lines == 10_000
    assert file.last.startswith("   " * 9_998 + "└─ SampleNode(")


def test_rich_tree() -> None:
    rich_console = pytest.importorskip("rich.console")
    root = small_tree()
    root.children[0].feedback = "\nToo long."
    root.children[0].success = False
    console = rich_console.Console(file=io.StringIO(), width=100, color_system=None)
    console.print(samples_tree(root, active_id=10_003))
    text = console.file.getvalue()
    for part in ("10001  2/3  score 0.67  0 messages", "10002  2/2  score 2.05", "Too long.", "← active"):
        assert part in text
    assert text.index("10002") < text.index("10003") < text.index("10004")
    console.print(samples_tree(root, max_depth=0))
    assert "⋮" in console.file.getvalue()


def test_rich_tree_does_not_take_feedback_for_markup() -> None:
    rich_console = pytest.importorskip("rich.console")
    root = SampleNode([], feedback="[bold]x[/nope]")
    console = rich_console.Console(file=io.StringIO(), width=80, color_system=None)
    console.print(samples_tree(root))
    assert "[bold]x[/nope]" in console.file.getvalue()
