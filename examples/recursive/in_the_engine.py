"""A tree inside an engine: a text shared by questions, a vote by forks, and answers that match a schema.

    python examples/recursive/in_the_engine.py

It runs the embedded model in this process. That model is too small to write the blocks of a run, so this
program asks the questions that model code would ask in the REPL.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from rich import print as show

import aici_vllm
from aici_vllm.recursive import CallNode, EngineBackend, EngineChat, LocalRLMRunner, render_tree

NOTES = " ".join(
    f"On day {day} the station saw {kind}."
    for day, kind in enumerate(["rain", "fog", "snow", "sunshine"] * 6, start=1)
)
WEATHER = {
    "type": "object",
    "properties": {"weather": {"enum": ["rain", "fog", "snow", "sunshine"]}},
    "required": ["weather"],
    "additionalProperties": False,
}


async def ask(llm: Any) -> CallNode:
    backend = EngineBackend(
        EngineChat(llm, turn_tokens=48, query_tokens=24),
        runner_factory=LocalRLMRunner,
        system_prompt="",
        max_iterations=1,
        env_max_iterations_multiplier=5,
    )
    backend.node = node = CallNode("run", 0, "questions about the notes")
    questions = [f"What did the station see on day {day}?" for day in (1, 6, 11)]
    print("shared:", await backend.query_batched(questions, shared=NOTES, schema=WEATHER))

    backend.messages = [{"role": "user", "content": f"{NOTES}\n\nIs it a dry place? Write a ```repl block."}]
    reply = await backend.turn(backend.messages)
    print("a turn:", str(reply).strip())
    backend.messages.append({"role": "assistant", "content": str(reply)})
    votes = await backend.query_batched(["Yes or no?"] * 4, fork=True, regex="yes|no", temperature=1.0)
    print("votes:", votes)
    await backend.aclose()
    node.finish(votes)
    return node


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    folder = str(aici_vllm.embedded_model())
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=2048, **aici_vllm.engine_args())
    show(render_tree(asyncio.run(ask(llm))))


if __name__ == "__main__":
    main()
