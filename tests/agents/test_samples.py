"""The sample tree: growing, walking, comparing, copying, and depth."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Iterator

import pytest

from aici_vllm.agents import (
    PostOrderDFS,
    PreOrderDFS,
    SampleNode,
    backpropagate,
    collect_all_feedback,
    expand,
    find_node,
    post_order,
    pre_order,
    reset_success,
)

DEEP = 10_000


def chain(length: int) -> tuple[SampleNode, SampleNode]:
    """The first and the last node of a tree that is one long branch."""
    first = last = SampleNode([])
    for number in range(length - 1):
        last = expand(last, [number])
    return first, last


def random_tree(rng: random.Random, size: int) -> list[SampleNode]:
    """A random tree's nodes, the root first."""
    nodes = [SampleNode([])]
    for number in range(size - 1):
        nodes.append(expand(rng.choice(nodes), [number]))
    return nodes


def recursive_pre(node: SampleNode) -> Iterator[SampleNode]:
    yield node
    for child in node.children:
        yield from recursive_pre(child)


def recursive_post(node: SampleNode) -> Iterator[SampleNode]:
    for child in node.children:
        yield from recursive_post(child)
    yield node


def ids(nodes: Iterator[SampleNode]) -> list[int]:
    return [node.id for node in nodes]


def test_a_bare_node_has_the_defaults() -> None:
    node = SampleNode(data="x")
    assert (node.parent, node.children, node.wins, node.visits) == (None, [], 0, 0)
    assert (node.data, node.feedback, node.success) == ("x", "", None)


def test_expand_appends_a_child() -> None:
    root = SampleNode([])
    first, second = expand(root, [1]), expand(root, [2], False, "no")
    assert root.children == [first, second]
    assert first.parent is root
    assert first.success is True
    assert (second.success, second.feedback) == (False, "no")


@pytest.mark.parametrize("seed", range(20))
def test_traversals_against_recursion(seed: int) -> None:
    nodes = random_tree(random.Random(seed), 40)
    root = nodes[0]
    assert ids(pre_order(root)) == ids(recursive_pre(root))
    assert ids(post_order(root)) == ids(recursive_post(root))
    assert len(root) == 40
    assert PreOrderDFS is pre_order
    assert PostOrderDFS is post_order


def test_backpropagate_reaches_ancestors_only() -> None:
    root = SampleNode([])
    left, right = expand(root, []), expand(root, [])
    below = expand(left, [])
    backpropagate(left, wins=True, visits=1)
    backpropagate(left, 2, 3)
    backpropagate(right, False)
    assert [(node.wins, node.visits) for node in (root, left, right, below)] == [
        (3, 5),
        (3, 4),
        (0, 1),
        (0, 0),
    ]


def test_find_by_id() -> None:
    nodes = random_tree(random.Random(1), 30)
    for node in nodes:
        assert nodes[0][node.id] is node
        assert find_node(nodes[0], node.id) is node
    assert nodes[0][-1] is None
    assert nodes[-1][nodes[0].id] is None


def test_reset_success_leaves_the_rest() -> None:
    root = SampleNode([])
    child = expand(root, [], success=False, feedback="f")
    backpropagate(child, 1)
    reset_success(root)
    assert (root.success, child.success) == (True, True)
    reset_success(child, False)
    assert (root.success, child.success, child.wins, child.feedback) == (True, False, 1, "f")


def test_feedback_is_joined_root_first() -> None:
    root = SampleNode(None, feedback="\nA")
    middle = expand(root, None)
    leaf = expand(middle, None, feedback="\nB")
    expand(root, None, feedback="sibling")
    assert collect_all_feedback(leaf) == "\nA\n----------\n\nB"
    assert collect_all_feedback(middle) == "\nA"
    assert collect_all_feedback(leaf, separator="|") == "\nA|\nB"
    middle.feedback = " "
    assert collect_all_feedback(leaf, separator="|") == "\nA| |\nB"


def test_string_forms() -> None:
    node = SampleNode(data=[1, 2], id=700_001)
    node.wins, node.visits = 6, 12
    assert str(node) == "SampleNode(id: 700001, stats: 6/12, length: 2)"
    node.data = "text"
    assert repr(node) == "SampleNode(id: 700001, stats: 6/12)"


def test_equality_looks_at_relatives_by_id_only() -> None:
    root = SampleNode([1])
    child = expand(root, [2])
    twin = copy.copy(root)
    assert twin is not root
    assert twin == root
    assert twin.children[0] == child
    twin.children[0].data = ["other"]
    assert twin == root
    assert twin.children[0] != child
    expand(twin, [3])
    assert twin == root  # pairs only
    twin.feedback = "x"
    assert twin != root
    assert root != SampleNode([1])
    assert root != "root"


def test_a_node_without_parent_differs_from_one_with() -> None:
    root = SampleNode([])
    child = expand(root, [])
    loose = SampleNode([], id=child.id, success=True)
    assert loose != child


def test_copies_are_deep_and_keep_ids() -> None:
    nodes = random_tree(random.Random(3), 25)
    inner = nodes[10]
    for twin in (copy.copy(inner), copy.deepcopy(inner), inner.copy(), pickle.loads(pickle.dumps(inner))):
        assert twin == inner
        assert twin is not inner
        top = twin
        while top.parent is not None:
            top = top.parent
        assert ids(pre_order(top)) == ids(pre_order(nodes[0]))
        assert not {id(node) for node in pre_order(top)} & {id(node) for node in nodes}
        twin.data.append("changed")
        assert inner.data != twin.data


def test_a_copy_keeps_links_that_only_one_side_knows() -> None:
    parent = SampleNode(["p"])
    child = SampleNode(["c"], parent=parent)
    twin = child.copy()
    assert twin.parent is not None
    assert twin.parent is not parent
    assert twin.parent == parent
    assert twin.parent.children == []


def test_ids_are_unique_across_trees_threads_and_hand_made_ids() -> None:
    made: list[SampleNode] = [SampleNode(None, id=900_000)]

    def make() -> None:
        made.extend([SampleNode(None) for _ in range(500)])

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({node.id for node in made}) == 2001


def test_a_node_is_true_and_can_be_hashed() -> None:
    root = SampleNode(None)
    assert root
    assert hash(copy.deepcopy(root)) == hash(root)
    assert len({root, expand(root, None)}) == 2


def test_deep_chains() -> None:
    first, last = chain(DEEP)
    assert len(first) == DEEP
    assert ids(pre_order(first)) == list(reversed(ids(post_order(first))))
    assert find_node(first, last.id) is last
    backpropagate(last, True)
    assert (first.wins, first.visits) == (1, 1)
    reset_success(first, None)
    for node in pre_order(first):
        node.feedback = "x"
    assert collect_all_feedback(last, "") == "x" * DEEP
    for twin in (copy.deepcopy(first), copy.copy(last), pickle.loads(pickle.dumps(first))):
        assert len(list(pre_order(twin))) in (DEEP, 1)
    assert copy.deepcopy(first) == first
    assert copy.deepcopy(last) == last
    assert repr(last).startswith("SampleNode(id: ")
