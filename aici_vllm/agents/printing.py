"""The sample tree as text: `print_samples`, and a rich tree for terminals."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from aici_vllm.agents.samples import SampleNode, describe_node, format_score
from aici_vllm.agents.scoring import UCT, AbstractScoringMethod, score

if TYPE_CHECKING:
    from rich.tree import Tree


def sample_lines(
    node: SampleNode,
    scoring: AbstractScoringMethod | None = None,
    *,
    max_depth: int | None = None,
    rng: random.Random | None = None,
) -> Iterator[str]:
    """The lines `print_samples` prints, without line ends."""
    scoring = UCT() if scoring is None else scoring
    # Entries are either a node with its branch and the prefix of its descendants, or a line that is ready.
    stack: list[tuple[SampleNode, str, str, int] | str] = [(node, "", "", 0)]
    while stack:
        entry = stack.pop()
        if isinstance(entry, str):
            yield entry
            continue
        current, branch, prefix, depth = entry
        yield branch + describe_node(current, score(current, scoring, rng))
        if current.children and max_depth is not None and depth >= max_depth:
            stack += [prefix, prefix + "⋮"]
            continue
        for index in reversed(range(len(current.children))):
            last = index == len(current.children) - 1
            below = prefix + ("   " if last else "│  ")
            stack.append((current.children[index], prefix + ("└─ " if last else "├─ "), below, depth + 1))


def print_samples(
    node: SampleNode,
    scoring: AbstractScoringMethod | None = None,
    file: TextIO | None = None,
    *,
    max_depth: int | None = None,
    rng: random.Random | None = None,
) -> None:
    """Print the tree under `node`, a line per sample: id, wins/visits, score and length of the conversation.

    `scoring` defaults to `UCT()`, `file` to standard output. Below `max_depth` (the node itself is at 0)
    children are replaced by a line with ⋮.
    """
    target = sys.stdout if file is None else file
    for line in sample_lines(node, scoring, max_depth=max_depth, rng=rng):
        target.write(line + "\n")


def samples_tree(
    node: SampleNode,
    scoring: AbstractScoringMethod | None = None,
    *,
    active_id: int | None = None,
    max_depth: int | None = None,
    rng: random.Random | None = None,
) -> Tree:
    """The tree under `node` for rich: `rich.print(samples_tree(call.samples))`.

    Samples that still pass are green, failed ones red; the active one is marked. Feedback stands below its
    sample.
    """
    from rich.text import Text
    from rich.tree import Tree

    scoring = UCT() if scoring is None else scoring

    def label(current: SampleNode) -> Text:
        style = {True: "green", False: "red", None: "dim"}[current.success]
        text = Text(f"{current.id}", style=f"bold {style}")
        text.append(f"  {current.wins}/{current.visits}", style="default not bold")
        text.append(f"  score {format_score(score(current, scoring, rng))}", style="cyan not bold")
        if isinstance(current.data, list):
            text.append(f"  {len(current.data)} messages", style="dim not bold")
        if current.id == active_id:
            text.append("  ← active", style="yellow")
        if current.feedback.strip():
            text.append("\n" + current.feedback.strip(), style="italic not bold default")
        return text

    root = Tree(label(node))
    stack = [(node, root, 0)]
    while stack:
        current, branch, depth = stack.pop()
        if current.children and max_depth is not None and depth >= max_depth:
            branch.add(Text("⋮", style="dim"))
            continue
        stack += [(child, branch.add(label(child)), depth + 1) for child in current.children]
    return root
