"""Branches of one fork, against `n` parallel samples and against one HTTP request a branch, on one server.

All continue the same long prompt, with prefix caching, and the prompt is new in every round. Computed tokens
went through the model: of requests, prompts as far as vLLM counts no hit of its prefix cache, and replies.

    python benchmarks/fork.py [--full] [--branches 8] [--prompt 1000] [--out FOLDER]
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from _engines import server
from _reporting import Bars, Report, arguments, median
from openai import OpenAI

TOKENS = 16
SCRIPT = """
import pyaici.server as aici

async def main():
    await aici.fork(%d)
    await aici.gen_tokens(max_tokens=16, min_tokens=16)

aici.start(main())
"""
Cost = tuple[float, int, int]
"""Seconds, tokens computed, tokens sampled."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--branches", type=int, nargs="+")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt, about")
    options = parser.parse_args()
    counts = options.branches or ([8, 64] if options.full else [8])
    length = options.prompt or (4000 if options.full else 1000)
    rounds = 5 if options.full else 2
    columns = (
        "branches",
        "way",
        "seconds",
        "computed tokens",
        "computed beyond prompt and replies",
        "per branch",
    )
    title = f"{TOKENS} tokens for each branch of a prompt of about {length}, medians of {rounds} rounds"
    report = Report("fork", title, columns)
    limits = '{"aici": {"limits": {"branches": 64}}}'
    with server("--max-num-seqs", "64", "--additional-config", limits) as url:
        client = OpenAI(base_url=url, api_key="none", timeout=1800)
        for count in counts:
            costs: dict[str, list[tuple[Cost, int]]] = {name: [] for name in WAYS}
            for index in range(rounds + 1):
                for number, (name, way) in enumerate(WAYS.items()):
                    prompt = text_of(length, seed=1000 * count + 10 * index + number)
                    costs[name].append((way(client, prompt, count), prompt_tokens(client, prompt)))
            for name, found in costs.items():
                report.rows.append(row(count, name, found[1:]))
    report.notes.append("each reply's last token is sampled and not computed; the goal is 1 more per branch")
    report.show()
    groups = [(f"{row[0]} branches, {row[1]}", (row[3],)) for row in report.rows]
    report.write(options.out, Bars(("computed tokens",), groups, ""))
    return 0


def row(count: int, name: str, found: list[tuple[Cost, int]]) -> list[Any]:
    seconds = median([cost[0] for cost, _ in found])
    computed = median([cost[1] for cost, _ in found])
    beyond = median([cost[1] - prompt - (cost[2] - count) for cost, prompt in found])
    return [count, name, seconds, float(computed), float(beyond), beyond / count]


def by_fork(client: OpenAI, prompt: str, count: int) -> Cost:
    """One request, whose script forks."""
    began = time.perf_counter()
    answer = client.completions.create(
        model="embedded",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0.0,
        extra_body={"vllm_xargs": {"controller": SCRIPT % count}},
    )
    seconds = time.perf_counter() - began
    found: Any = answer.model_extra["kv_transfer_params"]["controller"]["usage"]  # type: ignore[index]
    return seconds, found["computed_tokens"], found["sampled_tokens"]


def by_n(client: OpenAI, prompt: str, count: int) -> Cost:
    """One request with `n`; vLLM takes it only at a temperature over 0."""
    before = uncached_tokens(client)
    began = time.perf_counter()
    answer = client.completions.create(
        model="embedded",
        prompt=prompt,
        n=count,
        max_tokens=TOKENS,
        temperature=0.01,
        extra_body={"ignore_eos": True},
    )
    seconds = time.perf_counter() - began
    sampled = answer.usage.completion_tokens  # type: ignore[union-attr]
    return seconds, uncached_tokens(client) - before + sampled - count, sampled


def by_requests(client: OpenAI, prompt: str, count: int) -> Cost:
    """A request for each branch, all at once."""

    def ask(_: int) -> int:
        answer = client.completions.create(
            model="embedded",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        return answer.usage.completion_tokens  # type: ignore[union-attr]

    before = uncached_tokens(client)
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        sampled = sum(pool.map(ask, range(count)))
    seconds = time.perf_counter() - began
    return seconds, uncached_tokens(client) - before + sampled - count, sampled


WAYS: dict[str, Callable[[OpenAI, str, int], Cost]] = {
    "fork": by_fork,
    "n samples": by_n,
    "requests": by_requests,
}


def uncached_tokens(client: OpenAI) -> int:
    """Tokens of prompts that the server has not found in its prefix cache, ever."""
    text = httpx.get(str(client.base_url.join("/metrics"))).text
    found = {
        name: sum(
            float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", text, re.M)
        )
        for name in ("queries", "hits")
    }
    return round(found["queries"] - found["hits"])


def prompt_tokens(client: OpenAI, prompt: str) -> int:
    """How many tokens the server makes of a prompt."""
    answer = client.completions.create(model="embedded", prompt=prompt, max_tokens=1)
    return answer.usage.prompt_tokens  # type: ignore[union-attr]


def text_of(length: int, seed: int) -> str:
    """Some text of about `length` tokens that no other round has."""
    rng = random.Random(seed)
    words = ["river", "stone", "the", "of", "light", "under", "seven", "green", "walks", "slowly"]
    return f"Report {seed}: " + " ".join(rng.choice(words) for _ in range(length - 4))


if __name__ == "__main__":
    sys.exit(main())
