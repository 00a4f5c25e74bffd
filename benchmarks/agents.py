"""Retries from the client against retries as branches in the engine: tokens computed and wall time.

Each way plays the same search on the embedded model, with prefix caching on: rounds of samples, each followed
by a check that fails and by feedback. The ways are: one request per sample, one after the other; one request
with `n` per round; branches; and branches whose condition is checked while they write. All but the second
are greedy, for which vLLM takes no `n`. The prefix cache holds whole blocks, so their size matters: a CPU's
default is 128 tokens, GPUs mostly have 16.

    python benchmarks/agents.py [--full] [--rounds N] [--samples 4] [--retries 2] [--block-size N]
        [--out FOLDER]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from _reporting import Bars, Report, arguments, median

# Counting happens in the engine's workers, and functions travel there only with this.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

REPLY_TOKENS = 16
QUESTION = """You are checking the notes of a weather station. The notes of the last days are:
{notes}
Write one sentence about the weather of these days. Use capital letters only."""
NOTES = "\n".join(
    f"- Day {day}: {kind}, {7 * day % 30} degrees, wind of {day * 3 % 17} km/h from the {side}."
    for day, (kind, side) in enumerate(
        [("rain", "north"), ("fog", "east"), ("sunshine", "south"), ("snow", "west")] * 4, start=1
    )
)
FEEDBACK = "Not all letters are capital letters. Write the sentence again in capital letters."


@dataclass
class Cost:
    """What one search cost.

    Attributes:
        samples, rounds: of the search.
        steps: forward passes of the engine.
        prefilled_tokens: tokens computed that were not just sampled: prompts as far as no KV was there.
        sampled_tokens: of the replies.
        as_told: whether the requests tell of as many computed tokens as the workers counted; None for
            requests that do not tell.
    """

    samples: int
    rounds: int
    steps: int
    prefilled_tokens: int
    sampled_tokens: int
    seconds: float
    as_told: bool | None


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="times every way is measured")
    parser.add_argument("--samples", type=int, default=4, help="samples in a round")
    parser.add_argument("--retries", type=int, default=2)
    parser.add_argument("--block-size", type=int, help="tokens in a block of KV; by default vLLM's choice")
    options = parser.parse_args()
    rounds = options.rounds or (10 if options.full else 2)
    llm = engine(options.block_size)
    ways = ways_of(llm)
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    trees = {}
    for way in ways.values():
        measure(llm, way, options.samples, retries=0)
    for _ in range(rounds):
        for name, way in ways.items():
            cost, trees[name] = measure(llm, way, options.samples, options.retries)
            costs[name].append(cost)
    report = reported(costs, trees, rounds)
    report.show()
    groups = [(row[0], (row[4],)) for row in report.rows]
    report.write(options.out, Bars(("prefilled tokens",), groups, "tokens"))
    return 0


def engine(block_size: int | None) -> Any:
    """The embedded model in a vLLM that runs controllers."""
    from vllm import LLM

    import aici_vllm

    return LLM(
        str(aici_vllm.embedded_model()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        enable_prefix_caching=True,
        **({} if block_size is None else {"block_size": block_size}),
        **aici_vllm.engine_args(),
    )


def in_capitals(text: str) -> bool:
    """Whether a reply may still be what was asked for."""
    return text == text.upper()


def ways_of(llm: Any) -> dict[str, Callable[[Any], tuple[Any, int | None]]]:
    """Name → the search, given its config; it gives the call, and the computed tokens if requests tell."""
    from aici_vllm.agents import (
        AIGenerate,
        EngineSampler,
        PrefixChecked,
        VLLMModel,
        airetry,
        last_output,
        run,
    )

    def condition(call: Any) -> bool:
        return in_capitals(last_output(call))

    def search(config: Any, check: Any, sampling: dict[str, Any], **where: Any) -> Any:
        question = QUESTION.format(notes=NOTES)
        # All replies have one length, so that no way gains by luck; a check may end them earlier.
        sampling = {"max_tokens": REPLY_TOKENS, "min_tokens": REPLY_TOKENS, **sampling}
        call = run(AIGenerate(question, config=config, api_kwargs=sampling, **where))
        return airetry(check, call, FEEDBACK)

    def requests(config: Any, **sampling: Any) -> tuple[Any, None]:
        return search(config, condition, sampling, model=VLLMModel(llm)), None

    def branches(config: Any, check: Any, early: Any = None) -> tuple[Any, int]:
        with EngineSampler(llm, condition=early) as sampler:
            call = search(config, check, {}, sampler=sampler)
        return call, sampler.usage.computed_tokens

    checked = PrefixChecked(condition, in_capitals)
    return {
        "one request per sample": requests,
        "one request with n": lambda config: requests(config, n=config.n_samples, temperature=0.01),
        "branches": lambda config: branches(config, condition),
        "branches, prefix checked": lambda config: branches(config, checked, checked),
    }


def measure(
    llm: Any, way: Callable[[Any], tuple[Any, int | None]], samples: int, retries: int
) -> tuple[Cost, list[Any]]:
    """Play one search from an empty prefix cache; its cost, and its tree."""
    from aici_vllm.agents import AIMessage, RetryConfig, pre_order

    llm.reset_prefix_cache()
    llm.collective_rpc(start_counting)
    config = RetryConfig(n_samples=samples, max_retries=retries, temperature=0)
    began = time.perf_counter()
    call, told = way(config)
    seconds = time.perf_counter() - began
    steps, counted = llm.collective_rpc(stop_counting)[0]
    computed = counted if told is None else told
    nodes = list(pre_order(call.samples))[1:]
    replies = [[m for m in node.data if isinstance(m, AIMessage)][-1] for node in nodes]
    sampled = sum(reply.tokens[1] for reply in replies)
    # Each reply's tokens but the last go through the model once more, as input.
    prefilled = computed - (sampled - len(replies))
    rounds = 1 + call.config.retries
    tree = [(len(node.children), node.wins, node.visits, node.data[-1].content) for node in nodes]
    as_told = None if told is None else told == counted
    return Cost(len(replies), rounds, steps, prefilled, sampled, seconds, as_told), tree


def start_counting(worker: Any) -> None:
    """Count this worker's forward passes and the tokens they compute."""
    runner = worker.model_runner
    runner.counted = [0, 0]
    execute = runner.execute_model

    def counting(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        runner.counted[0] += scheduled.total_num_scheduled_tokens > 0
        runner.counted[1] += scheduled.total_num_scheduled_tokens
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = counting


def stop_counting(worker: Any) -> list[int]:
    """Count no longer; [forward passes, tokens]."""
    del worker.model_runner.execute_model
    counted: list[int] = worker.model_runner.counted
    return counted


def reported(costs: dict[str, list[Cost]], trees: dict[str, list[Any]], rounds: int) -> Report:
    """Medians side by side, and whether the searches agree."""
    columns = ("samples", "rounds", "steps", "prefilled tokens", "sampled tokens", "seconds")
    report = Report("agents", f"searches with retries, medians of {rounds}", ("way", *columns))
    for name, found in costs.items():
        fields = [column.replace(" ", "_") for column in columns]
        report.rows.append([name, *(median([getattr(cost, field) for cost in found]) for field in fields)])
    told = {cost.as_told for found in costs.values() for cost in found} - {None}
    shapes = [[row[:3] for row in tree] for tree in trees.values()]
    for what, equal in {
        "computed tokens, told and counted": told == {True},
        "replies per sample and in branches": trees["one request per sample"] == trees["branches"],
        "trees and checks of all ways": shapes.count(shapes[0]) == len(shapes),
    }.items():
        report.notes.append(f"{what}: {'equal' if equal else 'different'}")
    report.details = {"rounds": {name: [asdict(cost) for cost in found] for name, found in costs.items()}}
    return report


if __name__ == "__main__":
    sys.exit(main())
