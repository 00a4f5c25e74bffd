"""The plugin against itself at ten times the branches, tokens and scripts: host time of one unit of work.

vLLM's scheduler runs as in host_step.py. If growth is linear, the time of a unit stays the same.

    python benchmarks/growth.py [--full] [--out FOLDER]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from _reporting import Bars, Report, arguments, median
from _scheduler_alone import SchedulerAlone, ours

from aici_vllm import aici

MAX_TOKENS = 30_000
PATTERN = r"([A-Z]?[a-z]+( [a-z0-9]+)*[,.;!?]? )*"


async def words() -> None:
    await aici.gen_tokens(regex=PATTERN, max_tokens=MAX_TOKENS)


async def fork_wide(count: str) -> None:
    await aici.fork(int(count))
    await aici.gen_tokens(regex=PATTERN, max_tokens=MAX_TOKENS)


async def splice() -> None:
    while True:
        await aici.gen_tokens(max_tokens=1)
        await aici.FixedTokens(" and then")


def main() -> int:
    parser = arguments(__doc__)
    options = parser.parse_args()
    steps = 200 if options.full else 60
    most = 40 if options.full else 20
    columns = ("what grows", "from", "to", "us per unit", "us at 10 x", "ratio", "unit")
    report = Report("growth", "host time of one unit of work, CPU time of one thread, medians", columns)
    cases: list[tuple[str, Callable[[int, int], float], int, str]] = [
        ("branches of one request", branches, most // 2, "branch and step"),
        ("requests with a controller", scripts, most, "request and step"),
        ("splices at once", splices, most // 2, "splice"),
        ("tokens of a sequence", tokens, 2000 if options.full else 400, "step"),
    ]
    for name, measured, size, unit in cases:
        small, large = measured(size, steps), measured(10 * size, steps)
        report.rows.append([name, size, 10 * size, small * 1e6, large * 1e6, large / small, unit])
    report.notes.append("a ratio of 1 is linear growth; less is better than linear")
    report.show()
    groups = [(row[0], (row[3], row[4])) for row in report.rows]
    report.write(options.out, Bars(("small", "10 x"), groups, "us"))
    return 0


def branches(count: int, steps: int) -> float:
    """Seconds per branch and step of one request with `count` branches."""
    engine = ours(count, steps + 100, branches=count)
    engine.add(fork_wide, MAX_TOKENS, arg=str(count))
    return steady(engine, steps) / count


def scripts(count: int, steps: int) -> float:
    """Seconds per script and step of `count` requests."""
    engine = ours(count, steps + 100)
    for _ in range(count):
        engine.add(words, MAX_TOKENS)
    return steady(engine, steps) / count


def splices(count: int, steps: int) -> float:
    """Seconds per splice: every sequence is spliced after every token."""
    engine = ours(count, 4 * (steps + 100))
    for _ in range(count):
        engine.add(splice, MAX_TOKENS)
    for _ in range(30):
        engine.step()
    gc.collect()
    gc.freeze()
    before = engine.splices
    spent = sum(engine.step() for _ in range(steps))
    return spent / (engine.splices - before)


def tokens(length: int, steps: int) -> float:
    """Seconds per step of 8 sequences that are `length` tokens long."""
    engine = ours(8, length + steps + 200)
    for _ in range(8):
        engine.add(words, MAX_TOKENS)
    for _ in range(length):
        engine.step()
    return steady(engine, steps)


def steady(engine: SchedulerAlone, steps: int) -> float:
    """Median seconds of a step, after the first ones."""
    for _ in range(30):
        engine.step()
    gc.collect()
    gc.freeze()
    return median([engine.step() for _ in range(steps)])


if __name__ == "__main__":
    sys.exit(main())
