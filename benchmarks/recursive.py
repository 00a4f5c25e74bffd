"""Recursive runs inside the engine against the same runs over HTTP, on one server with prefix caching.

    python benchmarks/recursive.py            small cases
    python benchmarks/recursive.py --full     the sizes below

The baseline sends chat requests from an event loop, all of a batch at once, and puts long texts first, so
that vLLM's prefix cache shares what it can. The engine backend talks to the same server. Both are greedy, and
both leave the task out of later turns. Cases:

- chunks: one question over 64 chunks;
- questions: 16 questions on one long document;
- tree: 8 children with 8 queries each, two turns per run;
- vote: 8 votes that go on from one long conversation;
- straggler: a batch with one endless answer and a deadline.

Prefilled tokens are the tokens of prompts that the engine computed, as it reports them for each request. In
the tree the model writes 16 tokens per turn and the block behind them is given, since the embedded model
cannot write it: both ways compute that text once, as prompt. Overrun is what passes between the deadline and
the moment the server runs nothing any more.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from _engines import server
from _reporting import Bars, Report, arguments, median

from aici_vllm.recursive import (
    AsyncChildRLMBackend,
    BackendLimits,
    CallNode,
    EngineBackend,
    EngineChat,
    LocalRLMRunner,
    Reply,
    ServerEngine,
)
from aici_vllm.recursive.openai_chat import async_openai_chat

MODEL = "embedded"
OPTIONS = ("--max-model-len", "4096", "--enable-prefix-caching", "--enable-prompt-tokens-details")
TURN_TOKENS, ANSWER_TOKENS = 16, 8
DEADLINE = 2.0
STRAGGLER_TOKENS = 3000
SYSTEM = "You work on a context by writing Python. It is the variable `context` in a REPL."
WORDS = [
    "the",
    "station",
    "notes",
    "rain",
    "fog",
    "snow",
    "wind",
    "sunshine",
    "over",
    "hills",
    "rivers",
    "towns",
]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are; texts in words."""

    chunks: int
    chunk_words: int
    questions: int
    document_words: int
    children: int
    queries: int
    piece_words: int
    votes: int
    rounds: int


SMALL = Sizes(12, 40, 6, 300, 3, 3, 20, 4, 1)
FULL = Sizes(64, 40, 16, 1000, 8, 8, 20, 8, 3)


@dataclass
class Cost:
    """What one way cost in one case.

    Attributes:
        prefilled: tokens of prompts that were computed; `prompts` counts those of all prompts.
        overrun: seconds from the deadline until the server was idle; None without one.
        leaked: share of KV blocks in use once everything is over.
    """

    seconds: float
    prompts: int
    prefilled: int
    generated: int
    overrun: float | None
    leaked: float


def text(words: int, seed: int) -> str:
    """Words that look like notes; no two seeds give equal texts."""
    return f"{seed}: " + " ".join(WORDS[(seed * 7 + n * n + 3 * n) % len(WORDS)] for n in range(words))


# The two ways: each gives a runner's chat function, and a backend for queries outside of a run.


def script_of(messages: list[dict[str, str]]) -> str:
    """The block of a run's turn: split and ask, then answer."""
    turn = sum(message["role"] == "assistant" for message in messages)
    if turn:
        return "\n\n```repl\nFINAL(len(answers))\n```"
    if "PART" in messages[1]["content"]:
        split = "llm_query_batched(context.split('/'))"
    else:
        split = "rlm_query_batched(context.split('|'))"
    return f"\n\n```repl\nanswers = {split}\nprint(len(answers))\n```"


def replying(url: str, tokens: int) -> Callable[..., Awaitable[Reply]]:
    """A chat function whose replies all have one length."""
    return async_openai_chat(url, MODEL, temperature=0.0, max_tokens=tokens, min_tokens=tokens)


def over_http(url: str, tokens: int = ANSWER_TOKENS) -> Callable[..., Awaitable[Reply]]:
    """The baseline's chat function."""
    query, turn = replying(url, tokens), replying(url, TURN_TOKENS)

    async def chat(messages: list[dict[str, str]], model: str | None = None) -> Reply:
        if messages[0]["role"] != "system":
            return await query(messages)
        reply = await turn(messages)
        return Reply(reply + script_of(messages), reply.usage)

    return chat


class ScriptedTurns(EngineBackend):
    """An engine backend whose turns get their block behind what the model wrote."""

    async def turn(self, messages: list[dict[str, str]], model: str | None = None) -> Reply:
        reply = await super().turn(messages, model)
        return Reply(reply + script_of(messages), reply.usage)


class ScriptedChat(EngineChat):
    """Brings `ScriptedTurns`. Every reply has its full length."""

    backend_kind = ScriptedTurns


def in_engine(engine: ServerEngine, tokens: int = ANSWER_TOKENS) -> EngineChat:
    least = max(tokens, TURN_TOKENS)
    return ScriptedChat(
        engine, turn_tokens=TURN_TOKENS, query_tokens=tokens, min_tokens=least, constrained=False
    )


def backend_of(chat: Any, kind: Any) -> Any:
    made = kind(
        chat,
        runner_factory=LocalRLMRunner,
        system_prompt=SYSTEM,
        max_iterations=4,
        env_max_iterations_multiplier=5,
        limits=BackendLimits(max_depth=1),
    )
    made.node = CallNode("run", 0, "benchmark")
    return made


# The cases. Each plays on either way, and gives the call tree and what was answered.


@dataclass
class Way:
    """One way to run the cases: an engine, or None for the baseline over HTTP."""

    url: str
    sizes: Sizes
    engine: ServerEngine | None

    def backend(self, tokens: int = ANSWER_TOKENS) -> Any:
        if self.engine is not None:
            return backend_of(in_engine(self.engine, tokens), ScriptedTurns)
        return backend_of(over_http(self.url, tokens), AsyncChildRLMBackend)


async def close(backend: Any) -> None:
    if hasattr(backend, "aclose"):
        await backend.aclose()


async def chunks(way: Way) -> CallNode:
    backend, sizes = way.backend(), way.sizes
    await backend.query_batched(
        [f"{text(sizes.chunk_words, n)}\n\nWhich weather is noted?" for n in range(sizes.chunks)]
    )
    await close(backend)
    return backend.node


async def questions(way: Way) -> CallNode:
    backend, sizes = way.backend(), way.sizes
    document = text(sizes.document_words, 1)
    asked = [f"What is noted about {WORDS[n % len(WORDS)]} number {n}?" for n in range(sizes.questions)]
    if way.engine is not None:
        await backend.query_batched(asked, shared=document)
    else:
        await backend.query_batched([f"{document}\n\n{question}" for question in asked])
    await close(backend)
    return backend.node


async def tree(way: Way) -> CallNode:
    sizes = way.sizes
    chat = over_http(way.url) if way.engine is None else in_engine(way.engine)
    runner = LocalRLMRunner(
        chat, system_prompt=SYSTEM, max_depth=2, max_iterations=3, quote_task_every_turn=False
    )
    parts = [
        f"PART {child} " + "/".join(text(sizes.piece_words, 10 * child + n) for n in range(sizes.queries))
        for child in range(sizes.children)
    ]
    result = await runner.arun("|".join(parts), "Count the notes.")
    assert result.tree is not None
    if result.final_answer != str(sizes.children):
        raise RuntimeError(f"the tree did not play its script: {result.final_answer!r}")
    return result.tree


async def vote(way: Way) -> CallNode:
    sizes, ballot = way.sizes, "Is the station by the sea? Answer yes or no."
    ballots = [f"{ballot} ({number})" for number in range(sizes.votes)]
    parent = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": text(sizes.document_words, 2)},
    ]
    if way.engine is not None:
        backend = backend_of(in_engine(way.engine), EngineBackend)
        node: CallNode = backend.node
        reply = await backend.turn(parent)
        node.count(reply)
        backend.messages = [*parent, {"role": "assistant", "content": str(reply)}]
        await backend.query_batched(ballots, fork=True)
        await backend.aclose()
        return node
    node = CallNode("run", 0, "benchmark")
    reply = await replying(way.url, TURN_TOKENS)(parent)
    node.count(reply)
    parent.append({"role": "assistant", "content": str(reply)})
    query = replying(way.url, ANSWER_TOKENS)
    asked = (query([*parent, {"role": "user", "content": each}]) for each in ballots)
    for answer in await asyncio.gather(*asked):
        node.child("query", 0, ballot).count(answer)
    return node


async def straggler(way: Way) -> CallNode:
    slow = way.backend(tokens=STRAGGLER_TOKENS)
    quick = way.backend()
    quick.node = slow.node
    try:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(slow.query("Count to a million."), quick.query_batched(["One.", "Two."]))
    except TimeoutError:
        pass
    await close(slow)
    await close(quick)
    return slow.node


CASES: dict[str, Callable[[Way], Awaitable[CallNode]]] = {
    "chunks": chunks,
    "questions": questions,
    "tree": tree,
    "vote": vote,
    "straggler": straggler,
}


# Measuring


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="times every case is played, both ways in turn")
    options = parser.parse_args()
    sizes = FULL if options.full else SMALL
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    costs: dict[tuple[str, str], list[Cost]] = {}
    with server(*OPTIONS, VLLM_SERVER_DEV_MODE="1") as url:
        asyncio.run(measure_all(url, sizes, costs))
    report = reported(costs, sizes)
    report.show()
    groups = [
        (case, [median([c.prefilled for c in costs[case, way]]) for way in ("HTTP", "in the engine")])
        for case in CASES
    ]
    report.write(options.out, Bars(["HTTP", "in the engine"], groups, "prefilled tokens"))
    return 0


async def measure_all(url: str, sizes: Sizes, costs: dict[tuple[str, str], list[Cost]]) -> None:
    root = url.removesuffix("/v1")
    engine = ServerEngine(root, MODEL)
    async with httpx.AsyncClient(base_url=root, timeout=600) as http:
        ways = {"HTTP": Way(url, sizes, None), "in the engine": Way(url, sizes, engine)}
        await engine.frame()
        for way in ways.values():
            await chunks(Way(way.url, Sizes(2, 8, 1, 8, 1, 1, 8, 1, 1), way.engine))
        for _ in range(sizes.rounds):
            for case, play in CASES.items():
                for name, way in ways.items():
                    costs.setdefault((case, name), []).append(await measure(http, way, case, play))
                    print(f"{case}, {name}: {costs[case, name][-1]}", file=sys.stderr, flush=True)
    await engine.aclose()


async def measure(
    http: httpx.AsyncClient, way: Way, case: str, play: Callable[[Way], Awaitable[CallNode]]
) -> Cost:
    """Play one case from an empty prefix cache."""
    (await http.post("/reset_prefix_cache")).raise_for_status()
    began = time.perf_counter()
    node = await play(way)
    seconds = time.perf_counter() - began
    overrun = None
    if case == "straggler":
        await idle(http)
        overrun = time.perf_counter() - began - DEADLINE
    totals = node.totals()
    return Cost(
        seconds,
        totals["prompt_tokens"],
        totals["prompt_tokens"] - totals["cached_tokens"],
        totals["generated_tokens"],
        overrun,
        await leaked(http),
    )


async def idle(http: httpx.AsyncClient) -> None:
    """Return when the server runs no request."""
    while await gauge(http, "vllm:num_requests_running") > 0:
        await asyncio.sleep(0.01)


async def leaked(http: httpx.AsyncClient) -> float:
    """The share of KV blocks in use. The server measures it in steps, so one more request makes some."""
    await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2})
    return await gauge(http, "vllm:kv_cache_usage_perc")


async def gauge(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return max(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def reported(costs: dict[tuple[str, str], list[Cost]], sizes: Sizes) -> Report:
    columns = [
        "case",
        "way",
        "prefilled tokens",
        "cached",
        "generated",
        "seconds",
        "overrun s",
        "leaked blocks",
    ]
    report = Report("recursive", "recursive runs: over HTTP with prefix caching, and in the engine", columns)
    for (case, way), found in sorted(costs.items(), key=lambda item: list(CASES).index(item[0][0])):
        prompts, prefilled = (median([getattr(c, name) for c in found]) for name in ("prompts", "prefilled"))
        overruns = [cost.overrun for cost in found if cost.overrun is not None]
        report.rows.append(
            [
                case,
                way,
                int(prefilled),
                f"{1 - prefilled / prompts:.1%}" if prompts else None,
                int(median([cost.generated for cost in found])),
                median([cost.seconds for cost in found]),
                median(overruns) if overruns else None,
                f"{max(cost.leaked for cost in found):.1%}",
            ]
        )
    report.notes = [f"medians of {sizes.rounds}; {sizes}"]
    report.details = {"rounds": {f"{c}, {w}": [asdict(x) for x in found] for (c, w), found in costs.items()}}
    return report


if __name__ == "__main__":
    sys.exit(main())
