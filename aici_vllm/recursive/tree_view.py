"""The call tree in a terminal: a snapshot, and a live view while a run goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from .calltree import CallNode

_STATE_STYLE = {"running": "yellow", "done": "green", "failed": "bold red"}
_STATE_MARK = {"running": "…", "done": "✓", "failed": "✗"}


def render_tree(node: CallNode, *, max_children: int = 12) -> Tree:
    """The subtree as a rich `Tree`; of many children, runs, failures and what is going on are shown first."""
    tree = Tree(_line(node))
    _grow(tree, node, max_children)
    return tree


@contextmanager
def live_tree(
    node: CallNode, *, console: Console | None = None, refresh_per_second: float = 4.0
) -> Iterator[Live]:
    """Show the tree under `node` while the body runs, refreshed from a thread of its own."""

    class _Current:
        def __rich__(self) -> Tree:
            return render_tree(node)

    with Live(_Current(), console=console, refresh_per_second=refresh_per_second) as live:
        yield live


def _grow(tree: Tree, node: CallNode, max_children: int) -> None:
    children = list(node.children)
    shown = children
    if len(children) > max_children:
        shown = sorted(children, key=_importance)[:max_children]
        counts = Counter(child.state for child in children)
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        tree.add(Text(f"{len(children)} calls: {states}; {max_children} shown", style="dim"))
    for child in shown:
        _grow(tree.add(_line(child)), child, max_children)


def _importance(node: CallNode) -> tuple[bool, bool, bool]:
    return (node.kind != "run", node.state == "done", node.state == "failed")


def _line(node: CallNode) -> Text:
    style = _STATE_STYLE[node.state]
    line = Text(f"{_STATE_MARK[node.state]} ", style=style)
    line.append(f"{'run' if node.kind == 'run' else 'query'} d{node.depth} ", style="bold")
    line.append(_one_line(node.prompt, 48))
    line.append(f"  {node.seconds:.2f}s", style="cyan")
    if node.kind == "run":
        line.append(f"  {node.iterations} turns", style="dim")
    if node.usage is not None:
        used = node.usage
        tokens = f"{used.prompt_tokens} ({used.cached_tokens} cached) + {used.generated_tokens} tokens"
        line.append(f"  {tokens}", style="magenta")
    if node.error is not None:
        line.append(f"  {_one_line(node.error, 60)}", style="red")
    elif node.result is not None:
        line.append(f"  → {_one_line(node.result, 48)}", style="green")
    return line


def _one_line(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
