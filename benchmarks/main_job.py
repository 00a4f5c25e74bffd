"""The README's script in one request, against the same text from separate OpenAI calls to the same server.

Forward passes, wall time and tokens of both, in turn. The calls use vLLM's own structured outputs and prefix
caching.

    python benchmarks/main_job.py [--full] [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from _reporting import Bars, Report, arguments, median
from openai import OpenAI
from rich.console import Console

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
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rounds = options.rounds or (50 if options.full else 10)
    with server(Console()) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        ways: dict[str, Callable[[OpenAI], Cost]] = {"one script": by_script, "separate calls": by_calls}
        for way in ways.values():
            way(client)
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                costs[name].append(measure(way, client))
    report = reported(costs, rounds)
    report.show()
    report.write(options.out, Bars(("seconds",), [(row[0], (row[4],)) for row in report.rows], "s"))
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


def reported(costs: dict[str, list[Cost]], rounds: int) -> Report:
    """Medians side by side, and whether the texts agree."""
    columns = ("way", "calls", "forward passes", "tokens processed", "seconds")
    report = Report("main_job", f"the README's script, medians of {rounds} rounds", columns)
    fields = ("calls", "forward_passes", "processed_tokens", "seconds")
    for name, found in costs.items():
        report.rows.append([name, *(median([getattr(cost, field) for cost in found]) for field in fields)])
    texts = {name: found[0].text for name, found in costs.items()}
    same = len(set(texts.values())) == 1
    report.notes.append("both wrote the same text" if same else f"the texts differ: {texts}")
    report.details = {"rounds": {name: [asdict(cost) for cost in found] for name, found in costs.items()}}
    return report


if __name__ == "__main__":
    sys.exit(main())
