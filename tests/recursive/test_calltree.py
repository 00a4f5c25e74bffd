"""The call tree as data."""

import json
import threading

from aici_vllm.recursive import CallNode, Reply, Usage


def sample():
    root = CallNode("run", 0, "root")
    root.count(Reply("r", Usage(10, 5, 2)))
    root.count("no usage")
    child = root.child("run", 1, "p" * 200, "big")
    child.count(Reply("r", Usage(3, 0, 1)))
    child.child("query", 1, "leaf").finish("leaf result")
    child.finish(error="broke")
    root.child("query", 0, "second").finish("q" * 200)
    return root


def test_a_node_is_running_done_or_failed():
    root = sample()
    assert root.state == "running" and root.seconds >= 0
    assert [child.state for child in root.children] == ["failed", "done"]
    assert root.child("query", 0, "half \ud800").prompt == "half ?"
    assert root.children[0].prompt == "p" * 80 and root.children[1].result == "q" * 80


def test_the_walk_is_in_order_and_totals_are_of_the_subtree():
    root = sample()
    assert [node.prompt for node in root.walk()] == ["root", "p" * 80, "leaf", "second"]
    assert root.totals() == {
        "nodes": 4,
        "calls": 3,
        "prompt_tokens": 13,
        "cached_tokens": 5,
        "generated_tokens": 3,
    }
    assert root.children[0].totals()["nodes"] == 2


def test_the_json_has_every_field():
    data = json.loads(sample().as_json())
    assert data["kind"] == "run" and data["calls"] == 2 and data["prompt_tokens"] == 10
    child, second = data["children"]
    assert (child["error"], child["state"], child["model"], child["depth"]) == ("broke", "failed", "big", 1)
    assert (second["result"], second["prompt_tokens"]) == ("q" * 80, None)
    assert child["children"][0]["start"] >= child["start"] >= data["start"] == 0


def test_nodes_can_be_added_from_many_threads():
    root = CallNode("run", 0, "root")

    def add():
        for _ in range(500):
            root.child("query", 0, "q").finish("r")
            root.count(Reply("r", Usage(1, 0, 0)))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(root.children) == 2000 and root.usage == Usage(2000, 0, 0) and root.calls == 2000
