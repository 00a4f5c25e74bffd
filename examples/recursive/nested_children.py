"""Children with a REPL of their own: each chapter is a child's task, each child asks about its paragraphs.

    python examples/recursive/nested_children.py

The model is a script, so the run needs no server. Limits bound the tree: its depth, the number of its
children, the time of each child, and the threads of all batches together.
"""

from __future__ import annotations

from rich import print as show

from aici_vllm.recursive import LocalRLMRunner, render_tree

BOOK = "\n\n".join(
    f"# Chapter {chapter}\n"
    + "\n".join(f"Paragraph {p} of chapter {chapter} has {p + chapter} sheep." for p in range(4))
    for chapter in range(3)
)

ROOT = """```repl
chapters = context.split("\\n\\n")
counts = rlm_query_batched(["Count the sheep in this chapter.\\n" + chapter for chapter in chapters])
print(counts)
FINAL(sum(int(count) for count in counts))
```"""

CHILD = """```repl
paragraphs = [line for line in context.splitlines() if line.startswith("Paragraph")]
answers = llm_query_batched(["How many sheep? " + paragraph for paragraph in paragraphs])
FINAL(sum(int(answer) for answer in answers))
```"""


def scripted_chat(messages: list[dict[str, str]], model: str | None = None) -> str:
    """Plays the root, the children and the readers of single paragraphs."""
    if len(messages) == 1:
        return messages[0]["content"].split()[-2]
    return CHILD if "Count the sheep in this chapter" in messages[1]["content"] else ROOT


def main() -> None:
    runner = LocalRLMRunner(
        scripted_chat,
        max_depth=2,
        max_children_total=10,
        per_child_timeout_s=30,
        max_batch_workers=4,
        on_subcall_complete=lambda depth, model, seconds, error: print(
            f"child at depth {depth}: {seconds:.3f} s"
        ),
    )
    result = runner.run(BOOK, "How many sheep are in the book?")
    assert result.tree is not None
    show(render_tree(result.tree))
    print("answer:", result.final_answer)


if __name__ == "__main__":
    main()
