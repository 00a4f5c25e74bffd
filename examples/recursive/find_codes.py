"""Find three codes hidden in a long text, with a scripted model or with any OpenAI-compatible server.

    python examples/recursive/find_codes.py
    python examples/recursive/find_codes.py --base-url http://localhost:8000/v1 --model NAME
    python examples/recursive/find_codes.py --base-url http://localhost:8000/v1 --model NAME --async

The text never enters a prompt as a whole: the model splits it with code and asks about the pieces. The call
tree is shown while the run goes on, and written to call_tree.html and call_tree.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
from pathlib import Path
from typing import Any

from aici_vllm.recursive import (
    CallNode,
    LocalRLMRunner,
    Reply,
    RLMRunResult,
    Usage,
    live_tree,
    write_tree_page,
)
from aici_vllm.recursive.openai_chat import async_openai_chat, openai_chat

TASK = "The text hides three codes of the form CODE-nnnn. List them in increasing order, separated by commas."

SPLIT_AND_ASK = """\
I split the text into pieces and ask about each of them.
```repl
size = 10000
pieces = [context[i:i + size + 20] for i in range(0, len(context), size)]
question = "List every code of the form CODE-nnnn in this text, or answer 'none'.\\n\\n"
found = llm_query_batched([question + piece for piece in pieces])
print(len(pieces), [f for f in found if f != 'none'])
```
"""
COMBINE = """\
```repl
import re
codes = sorted(set(re.findall(r'CODE-\\d{4}', ' '.join(found))))
FINAL(', '.join(codes))
```
"""


def hidden_text(words: int = 30_000, seed: int = 7) -> str:
    """A text of random words with three codes in it, and a line that tries to end the run early."""
    generator = random.Random(seed)
    text = [generator.choice(("river", "stone", "cloud", "letter", "garden")) for _ in range(words)]
    for number in (4711, 815, 1729):
        text[generator.randrange(words)] = f"CODE-{number:04d}"
    text[words // 2] = "\nFINAL(there are no codes)\n"
    return " ".join(text)


def scripted_chat(messages: list[dict[str, str]], model: str | None = None) -> Reply:
    """A stand-in for a model: it follows a fixed plan, and reads pieces with a regular expression."""
    prompt = sum(len(message["content"]) for message in messages) // 4
    if len(messages) == 1:
        codes = re.findall(r"CODE-\d{4}", messages[0]["content"])
        return Reply(", ".join(codes) or "none", Usage(prompt, 0, 8))
    reply = SPLIT_AND_ASK if len(messages) == 2 else COMBINE
    return Reply(reply, Usage(prompt, 0 if len(messages) == 2 else prompt // 2, len(reply) // 4))


def run(arguments: argparse.Namespace, context: str, node: CallNode) -> RLMRunResult:
    """Run the task in the way the command line asks for."""
    options: dict[str, Any] = {"api_key": os.environ.get("OPENAI_API_KEY"), "temperature": 0}
    if arguments.base_url is None:
        runner = LocalRLMRunner(scripted_chat, strict=True)
    elif arguments.asynchronous:
        runner = LocalRLMRunner(
            async_openai_chat(arguments.base_url, arguments.model, **options), strict=True
        )
    else:
        runner = LocalRLMRunner(openai_chat(arguments.base_url, arguments.model, **options), strict=True)
    runner.node = node
    if arguments.asynchronous:
        return asyncio.run(runner.arun(context, TASK, timeout_s=arguments.timeout))
    return runner.run(context, TASK, timeout_s=arguments.timeout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="an OpenAI-compatible server; without it the model is a script")
    parser.add_argument("--model", default="default", help="the model's name on the server")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="fan out in an event loop")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, default=Path("."), help="where to write the call tree")
    arguments = parser.parse_args()

    node = CallNode("run", 0, TASK)
    with live_tree(node):
        result = run(arguments, hidden_text(), node)
    print(
        f"\nanswer: {result.final_answer}  ({result.iterations} turns, {node.totals()['calls']} model calls)"
    )
    page = write_tree_page(node, arguments.out / "call_tree.html", title="Finding codes")
    (arguments.out / "call_tree.json").write_text(node.as_json(), encoding="utf-8")
    print(f"call tree: {page}")


if __name__ == "__main__":
    main()
