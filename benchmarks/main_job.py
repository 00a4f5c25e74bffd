"""The README's script in one request, against the same text from separate OpenAI calls to the same server.

Prints forward passes, wall time and tokens of both, alternating, and writes them as JSON. The calls use
vLLM's own structured outputs and prefix caching.

    python benchmarks/main_job.py [--rounds 10] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from demo import SCRIPT, server  # noqa: E402 -- the demo's server is the one to measure

BOS = "<|im_start|>"
"""The embedded model's; the plugin puts it in place of an empty prompt, so the calls start with it too."""


@dataclass
class Cost:
    """What one way of getting the text cost, once.

    Attributes:
        forward_passes: steps that computed a sequence, summed over sequences; a call that generates n
            tokens takes n.
        processed_tokens: tokens that went through the model or its prefix cache: prompts, fixed text and
            sampled tokens, once for every request that held them.
    """

    text: str
    calls: int
    forward_passes: int
    processed_tokens: int
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    with server(console) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        ways: dict[str, Callable[[OpenAI], Cost]] = {"one script": by_script, "separate calls": by_calls}
        for way in ways.values():
            way(client)
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                costs[name].append(measure(way, client))
    show(console, costs)
    if arguments.json:
        rows = {name: [asdict(cost) for cost in found] for name, found in costs.items()}
        arguments.json.write_text(json.dumps({"machine": machine(), "rounds": rows}, indent=2))
    return 0


def by_script(client: OpenAI) -> Cost:
    """One request that carries the script."""
    answer = client.completions.create(
        model="embedded",
        prompt="",
        max_tokens=200,
        temperature=0.0,
        extra_body={"vllm_xargs": {"controller": SCRIPT.read_text()}},
    )
    usage = answer.kv_transfer_params["controller"]["usage"]
    processed = usage["sampled_tokens"] + usage["spliced_tokens"]
    return Cost(answer.choices[0].text, 1, usage["forward_passes"], processed)


def by_calls(client: OpenAI) -> Cost:
    """The same steps from the client: every constrained piece is a call of its own."""
    usages = []

    def ask(prompt: str, **constraint: object) -> str:
        answer = client.completions.create(
            model="embedded",
            prompt=prompt,
            max_tokens=6,
            temperature=0.0,
            extra_body={"structured_outputs": constraint},
        )
        usages.append(answer.usage)
        return answer.choices[0].text

    question = BOS + "Q: Name a planet of our solar system.\nA: A planet is"
    first = ask(question, regex=r" [A-Z][a-z]+[.,]")
    text = f"{question} not{first[:-1]}, but"
    text += ask(text, regex=r" [A-Z][a-z]+\.") + " It is"
    with ThreadPoolExecutor(2) as pool:
        size = pool.submit(ask, text + " a planet that is", choice=[" big", " small", " tiny"])
        colours = [" red", " blue", " grey", " brown"]
        colour = pool.submit(ask, text + " of a colour that is", choice=colours)
    text = f"{text}{size.result()} and{colour.result()}.".removeprefix(BOS)
    passes = sum(usage.completion_tokens for usage in usages)
    return Cost(text, len(usages), passes, sum(usage.total_tokens for usage in usages))


def measure(way: Callable[[OpenAI], Cost], client: OpenAI) -> Cost:
    """Run it once, with the time it took."""
    began = time.perf_counter()
    cost = way(client)
    cost.seconds = time.perf_counter() - began
    return cost


def show(console: Console, costs: dict[str, list[Cost]]) -> None:
    """Medians side by side, and whether the texts agree."""
    table = Table(title=f"medians of {len(costs['one script'])} rounds on {machine()}")
    for heading in ("", "calls", "forward passes", "tokens processed", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in costs.items():
        fields = ("calls", "forward_passes", "processed_tokens")
        medians = [statistics.median([getattr(cost, field) for cost in found]) for field in fields]
        seconds = statistics.median([cost.seconds for cost in found])
        table.add_row(name, *(f"{value:g}" for value in medians), f"{seconds:.3f}")
    console.print(table)
    texts = {name: found[0].text for name, found in costs.items()}
    if len(set(texts.values())) == 1:
        console.print("both wrote the same text")
    else:
        console.print(f"the texts differ: {texts}")


def machine() -> str:
    """Processor and its number of cores."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
