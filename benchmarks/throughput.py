"""Constrained generation by controllers, against vLLM's structured outputs with each of its backends.

Two engines live at once and take the same batches in turn: the plugin's, and an unmodified vLLM with one
backend. All write the same kind of text from the same prompts, greedily. What a constraint forces is
spliced by a controller and sampled by vLLM; the forced share is given. Forced text takes the tokens that
the tokenizer makes of it. vLLM's masks let the model spell it in more, and it samples an end behind each
text. So a text counts as many tokens as the tokenizer makes of it, whoever wrote it. The ratio of tokens as
each engine counts them stands beside, that of requests, and how many tokens of its own a request has.

    python benchmarks/throughput.py [--full] [--backends xgrammar] [--batches 1 8] [--kinds regex choice]
        [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _engines import engine
from _reporting import Bars, Report, arguments, median, shown

import aici_vllm
from aici_vllm import aici

BACKENDS = ("xgrammar", "guidance", "outlines")
MAX_TOKENS = 64
CHOICES = ["certainly not", "perhaps in the afternoon", "yes, without any doubt"]
REGEX = r"[A-Z][a-z]{2,8}( [a-z]{2,8}){5}\."
FORM = r"name: [A-Z][a-z]{2,8}\nage in years: [1-9][0-9]\nanswer to the question: (yes|no)\n"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "favourite_colours": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["first_name", "age", "favourite_colours"],
    "additionalProperties": False,
}


async def regex() -> None:
    await aici.gen_tokens(regex=REGEX, max_tokens=MAX_TOKENS)


async def form() -> None:
    await aici.gen_tokens(regex=FORM, max_tokens=MAX_TOKENS)


async def choice() -> None:
    await aici.gen_tokens(options=CHOICES, max_tokens=MAX_TOKENS)


async def schema() -> None:
    await aici.gen_tokens(json_schema=SCHEMA, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Kind:
    """A constraint, as a controller and as vLLM's parameters."""

    controller: Callable[[], Any]
    structured: dict[str, Any]


KINDS = {
    "regex": Kind(regex, {"regex": REGEX}),
    "regex, mostly forced": Kind(form, {"regex": FORM}),
    "choice": Kind(choice, {"choice": CHOICES}),
    "JSON": Kind(schema, {"json": json.dumps(SCHEMA)}),
}


@dataclass
class Round:
    """One batch: seconds, tokens that the engine counts, how many of them were spliced, and the texts.

    `written` are the tokens that the tokenizer makes of the texts.
    """

    seconds: float
    tokens: int
    spliced: int
    texts: list[str]
    written: int


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--backends", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    backends = options.backends or (BACKENDS if options.full else BACKENDS[:1])
    batches = options.batches or ([1, 8, 64] if options.full else [1, 8])
    rounds = options.rounds or (10 if options.full else 3)
    columns = (
        "kind",
        "backend",
        "batch",
        "ours tok/s",
        "vLLM tok/s",
        "ratio",
        "as counted",
        "of req/s",
        "tok/req",
        "same text",
        "forced",
    )
    title = f"constrained generation to the end, medians of {rounds} rounds"
    report = Report("throughput", title, columns)
    with engine(plugin=True) as ours:
        for backend in backends:
            with engine(plugin=False, structured_outputs_config={"backend": backend}) as theirs:
                for size in batches:
                    for name in options.kinds:
                        report.rows.append(compare(ours, theirs, backend, name, KINDS[name], size, rounds))
                        print(*map(shown, report.rows[-1]), file=sys.stderr, flush=True)
    report.notes.append(
        "tok/s: tokens that the tokenizer makes of the text; ratios are ours to vLLM's: of these, of tokens "
        "as each engine counts them, and of requests; tok/req: tokens of a request as counted, ours and "
        "vLLM's; same text: part of the requests for which both wrote the same; forced: part of our tokens "
        "that was spliced"
    )
    report.show()
    groups = [(f"{row[0]}, {row[1]}, {row[2]}", (row[3], row[4])) for row in report.rows]
    report.write(options.out, Bars(("controller", "vLLM structured outputs"), groups, "tok/s"))
    return 0


def compare(ours: Any, theirs: Any, backend: str, name: str, kind: Kind, size: int, rounds: int) -> list[Any]:
    """A row of the table; the first round of each compiles and is not counted."""
    mine, peers = [by_controller(ours, kind, size)], [by_vllm(theirs, kind, size)]
    for index in range(rounds):
        # Whoever goes second is now the one, now the other.
        if index % 2:
            peers.append(by_vllm(theirs, kind, size))
        mine.append(by_controller(ours, kind, size))
        if not index % 2:
            peers.append(by_vllm(theirs, kind, size))
    rates = [median([found.written / found.seconds for found in side[1:]]) for side in (mine, peers)]
    counted = [median([found.tokens / found.seconds for found in side[1:]]) for side in (mine, peers)]
    served = [median([size / found.seconds for found in side[1:]]) for side in (mine, peers)]
    forced = sum(found.spliced for found in mine) / sum(found.tokens for found in mine)
    ratios = [ours / peer for ours, peer in (rates, counted, served)]
    lengths = "/".join(shown(side[-1].tokens / size) for side in (mine, peers))
    same = sum(a == b for a, b in zip(mine[-1].texts, peers[-1].texts, strict=True)) / size
    return [
        *(name, backend, size, *rates, *ratios),
        *(lengths, f"{same:.0%}", f"{forced:.0%}"),
    ]


def prompts(size: int) -> list[str]:
    return [f"This is question number {index}, and the answer to it is:\n" for index in range(size)]


def by_controller(llm: Any, kind: Kind, size: int) -> Round:
    began = time.perf_counter()
    results = aici_vllm.run(llm, kind.controller, prompts(size))
    seconds = time.perf_counter() - began
    tokens = sum(len(result.branches[0].token_ids) for result in results)
    spliced = sum(result.usage.spliced_tokens for result in results)
    return _round(llm, seconds, tokens, spliced, [result.text for result in results])


def by_vllm(llm: Any, kind: Kind, size: int) -> Round:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(**kind.structured)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, structured_outputs=constraint)
    began = time.perf_counter()
    outputs = llm.generate(prompts(size), params, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return _round(llm, seconds, tokens, 0, [output.outputs[0].text for output in outputs])


def _round(llm: Any, seconds: float, tokens: int, spliced: int, texts: list[str]) -> Round:
    tokenizer = llm.get_tokenizer()
    written = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return Round(seconds, tokens, spliced, texts, written)


if __name__ == "__main__":
    sys.exit(main())
