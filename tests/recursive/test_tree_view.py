"""The call tree in a terminal."""

import io

from rich.console import Console

from aici_vllm.recursive import CallNode, LocalRLMRunner, Reply, Usage, live_tree, render_tree


def shown(node, **options):
    console = Console(file=io.StringIO(), width=200)
    console.print(render_tree(node, **options))
    return console.file.getvalue()


def test_a_line_has_depth_tokens_result_and_error():
    root = CallNode("run", 0, "the task", iterations=3)
    root.count(Reply("r", Usage(100, 40, 7)))
    root.child("query", 0, "good").finish("fine")
    root.child("run", 1, "bad").finish(error="broke\nhere")
    root.finish("answer")
    first, *rest = shown(root).splitlines()
    assert all(
        part in first for part in ("run d0", "the task", "3 turns", "100 (40 cached) + 7 tokens", "answer")
    )
    assert any("query d0 good" in line and "fine" in line for line in rest)
    assert any("run d1 bad" in line and "broke here" in line for line in rest)


def test_of_many_children_the_telling_ones_are_shown():
    root = CallNode("run", 0, "root")
    for number in range(10_000):
        root.child("query", 0, f"q{number}").finish("r")
    root.child("query", 0, "broken").finish(error="failed here")
    root.child("query", 0, "waiting")
    root.child("run", 1, "child run").finish("r")
    text = shown(root, max_children=5)
    assert "10003 calls: 10001 done, 1 failed, 1 running; 5 shown" in text
    assert "failed here" in text and "waiting" in text and "child run" in text
    assert len(text.splitlines()) == 7


def test_the_live_view_follows_a_run():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    root = CallNode("run", 0, "the task")
    runner = LocalRLMRunner(
        lambda messages: "```repl\nFINAL(llm_query('q'))\n```" if len(messages) > 1 else "leaf"
    )
    runner.node = root
    with live_tree(root, console=console):
        runner.run("c", "the task")
    assert root.state == "done" and "leaf" in console.file.getvalue()
