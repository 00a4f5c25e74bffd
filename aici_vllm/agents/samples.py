"""The sample tree: one node per sample, its statistics, and the operations that grow and walk it.

Nothing here recurses, so chains of any depth can be copied, compared, pickled and walked.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

FEEDBACK_SEPARATOR = "\n----------\n"


class _NodeIds:
    """Hands out ids that no node of this process has, also after a tree was unpickled or built by hand."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            self._last += 1
            return self._last

    def reserve(self, used: int) -> None:
        with self._lock:
            self._last = max(self._last, used)


_node_ids = _NodeIds()


class SampleNode:
    """One sample of a Monte Carlo tree search.

    `data` is what is being searched for, usually a conversation. `wins` of `visits` checks passed in this
    subtree. `feedback` collects what failed checks said. `success` is None for a node that was never
    generated or checked, True while it passes, False once it failed. `node[id]` finds a node of the subtree
    (None when absent), `len(node)` counts the subtree, `copy.copy` and `copy.deepcopy` both copy the whole
    tree and keep the ids.
    """

    def __init__(
        self,
        data: Any,
        *,
        id: int | None = None,
        parent: SampleNode | None = None,
        children: list[SampleNode] | None = None,
        wins: int = 0,
        visits: int = 0,
        feedback: str = "",
        success: bool | None = None,
    ) -> None:
        if id is None:
            id = _node_ids.take()
        else:
            _node_ids.reserve(id)
        self.id = id
        self.parent = parent
        self.children: list[SampleNode] = [] if children is None else children
        self.wins = wins
        self.visits = visits
        self.data = data
        self.feedback = feedback
        self.success = success
        # The feedback message that add_feedback put at the end of a conversation for this node.
        self.feedback_message: Any = None
        # Texts that in-place feedback for this node added to a user message.
        self.inplace_additions: list[str] = []

    def __getitem__(self, id: int) -> SampleNode | None:
        return find_node(self, id)

    def __len__(self) -> int:
        return sum(1 for _ in pre_order(self))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[SampleNode]:
        return pre_order(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleNode):
            return NotImplemented
        parents = (self.parent and self.parent.id) == (other.parent and other.parent.id)
        pairs = zip(self.children, other.children, strict=False)
        return (
            parents
            and all(mine.id == theirs.id for mine, theirs in pairs)
            and (self.id, self.wins, self.visits, self.feedback, self.success)
            == (other.id, other.wins, other.visits, other.feedback, other.success)
            and bool(self.data == other.data)
        )

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return describe_node(self)

    def copy(self) -> SampleNode:
        """A deep copy of the whole tree; returns the node that stands where this one stands. Ids are kept."""
        return copy.deepcopy(self)

    def __copy__(self) -> SampleNode:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleNode:
        rows, position = _tree_rows(self)
        nodes = [_node_from_row(copy.deepcopy(row, memo)) for row in rows]
        _link(nodes, rows)
        for original, twin in zip(_connected(self), nodes, strict=True):
            memo[id(original)] = twin
        return nodes[position]

    def __reduce__(self) -> tuple[Callable[..., SampleNode], tuple[list[_Row], int]]:
        return _rebuild_tree, _tree_rows(self)


class _Row(NamedTuple):
    """One node of a flattened tree; relatives are positions in the list of rows."""

    parent: int | None
    children: list[int]
    fields: dict[str, Any]


def _connected(node: SampleNode) -> list[SampleNode]:
    """Every node reachable through parents and children, also where only one side knows the other."""
    found, seen, todo = [], {id(node)}, [node]
    while todo:
        current = todo.pop()
        found.append(current)
        for relative in [current.parent, *reversed(current.children)]:
            if relative is not None and id(relative) not in seen:
                seen.add(id(relative))
                todo.append(relative)
    return found


def _tree_rows(node: SampleNode) -> tuple[list[_Row], int]:
    """The whole tree around `node` as rows, and the position of `node` among them."""
    nodes = _connected(node)
    position = {id(member): index for index, member in enumerate(nodes)}
    rows = []
    for member in nodes:
        fields = {name: value for name, value in vars(member).items() if name not in ("parent", "children")}
        parent = None if member.parent is None else position[id(member.parent)]
        rows.append(_Row(parent, [position[id(child)] for child in member.children], fields))
    return rows, position[id(node)]


def _node_from_row(row: _Row) -> SampleNode:
    node = SampleNode(row.fields["data"], id=row.fields["id"])
    vars(node).update(row.fields)
    return node


def _link(nodes: list[SampleNode], rows: list[_Row]) -> None:
    for node, row in zip(nodes, rows, strict=True):
        node.parent = None if row.parent is None else nodes[row.parent]
        node.children = [nodes[child] for child in row.children]


def _rebuild_tree(rows: list[_Row], position: int) -> SampleNode:
    """The inverse of `_tree_rows`."""
    nodes = [_node_from_row(row) for row in rows]
    _link(nodes, rows)
    return nodes[position]


def format_score(score: float) -> str:
    """A score as printed: rounded to two digits, shortest form (`1.4`, `0.0`, `2.18`)."""
    return repr(round(float(score), 2))


def describe_node(node: SampleNode, score: float | None = None) -> str:
    """The one-line form of a node: id, wins/visits, the score if given, the length if `data` is a list."""
    parts = [f"id: {node.id}", f"stats: {node.wins}/{node.visits}"]
    if score is not None:
        parts.append(f"score: {format_score(score)}")
    if isinstance(node.data, list):
        parts.append(f"length: {len(node.data)}")
    return f"SampleNode({', '.join(parts)})"


def tree_root(node: SampleNode) -> SampleNode:
    """The topmost ancestor of `node`."""
    while node.parent is not None:
        node = node.parent
    return node


def lineage(node: SampleNode) -> Iterator[SampleNode]:
    """`node`, its parent, and so on up to the root."""
    current: SampleNode | None = node
    while current is not None:
        yield current
        current = current.parent


def pre_order(node: SampleNode) -> Iterator[SampleNode]:
    """The subtree, a node before its children, children left to right."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(reversed(current.children))


def post_order(node: SampleNode) -> Iterator[SampleNode]:
    """The subtree, children left to right before their node."""
    stack = [(node, iter(node.children))]
    while stack:
        current, remaining = stack[-1]
        child = next(remaining, None)
        if child is None:
            stack.pop()
            yield current
        else:
            stack.append((child, iter(child.children)))


PreOrderDFS = pre_order
PostOrderDFS = post_order


def expand(parent: SampleNode, data: Any, success: bool | None = True, feedback: str = "") -> SampleNode:
    """Add a child with `data` to `parent` and return it."""
    child = SampleNode(data, parent=parent, success=success, feedback=feedback)
    parent.children.append(child)
    return child


def backpropagate(node: SampleNode, wins: int, visits: int = 1) -> None:
    """Add `wins` (a bool counts as 0 or 1) and `visits` to the node and all its ancestors."""
    for ancestor in lineage(node):
        ancestor.wins += int(wins)
        ancestor.visits += visits


def find_node(node: SampleNode, id: int) -> SampleNode | None:
    """The node of this subtree with `id`, or None."""
    return next((found for found in pre_order(node) if found.id == id), None)


def reset_success(node: SampleNode, success: bool | None = True) -> None:
    """Set `success` on every node of the subtree; statistics and feedback stay."""
    for member in pre_order(node):
        member.success = success


def collect_all_feedback(node: SampleNode, separator: str = FEEDBACK_SEPARATOR) -> str:
    """The non-empty feedback of the root, ..., the parent and the node itself, in that order, joined."""
    found = [ancestor.feedback for ancestor in lineage(node) if ancestor.feedback != ""]
    return separator.join(reversed(found))
