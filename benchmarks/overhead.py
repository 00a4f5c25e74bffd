"""Plain requests on a vLLM that runs the plugin, against the same vLLM without it.

Both engines live at once and take the same batch in turn, in the order ABBA, so that a slow minute of the
machine hits both.

    python benchmarks/overhead.py [--full] [--batch 16] [--tokens 64] [--out FOLDER]
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from _engines import engine
from _reporting import Bars, Report, arguments, median, quantile

GOAL = 0.99
"""Throughput with the plugin, of that without."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    rounds = 40 if options.full else 4
    with engine(plugin=True) as ours, engine(plugin=False) as theirs:
        llms = {"with": ours, "without": theirs}
        for llm in llms.values():
            batch(llm, options.batch, 8)
        seconds: dict[str, list[float]] = {name: [] for name in llms}
        gaps: dict[str, list[float]] = {name: [] for name in llms}
        for index in range(rounds):
            for name in (("with", "without"), ("without", "with"))[index % 2]:
                took, each = batch(llms[name], options.batch, options.tokens)
                seconds[name].append(took)
                gaps[name] += each
    tokens = options.batch * options.tokens
    columns = ("plugin", "tokens/s", "p50 token ms", "p99 token ms")
    title = (
        f"plain requests, {options.batch} at once, {options.tokens} tokens each, medians of {rounds} rounds"
    )
    report = Report("overhead", title, columns)
    for name in llms:
        cells = [quantile(gaps[name], part) * 1e3 for part in (0.5, 0.99)]
        report.rows.append([name, tokens / median(seconds[name]), *cells])
    ratios = [b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    met = "met" if median(ratios) >= GOAL else "not met"
    report.notes.append(
        f"throughput with the plugin, of that without, round by round: median {median(ratios):.3f} "
        f"({spread}); goal {GOAL}: {met}"
    )
    report.details = {"seconds": seconds, "ratios": ratios}
    report.show()
    report.write(
        options.out, Bars(("tokens/s",), [(f"{row[0]} plugin", (row[1],)) for row in report.rows], "")
    )
    return 0


def batch(llm: Any, size: int, tokens: int) -> tuple[float, list[float]]:
    """Seconds for a batch, and those from each step's tokens to the next step's: all requests are in each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    params.output_kind = RequestOutputKind.DELTA
    core = llm.llm_engine
    times = [time.perf_counter()]
    for index in range(size):
        prompt = f"Number {index} of a list of things to say about the sea is"
        core.add_request(f"{times[0]}-{index}", prompt, params)
    while core.has_unfinished_requests():
        if core.step():
            times.append(time.perf_counter())
    return times[-1] - times[0], [after - before for before, after in itertools.pairwise(times[1:])]


if __name__ == "__main__":
    sys.exit(main())
