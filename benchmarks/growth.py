"""The plugin against itself at ten times the branches, tokens and scripts: host time of one unit of work.

vLLM's scheduler runs as in host_step.py, a step of the small and of the large one in turn. If growth is
linear, the time of a unit stays the same. Beside it, where plain requests can do the same, how vLLM grows.

    python benchmarks/growth.py [--full] [--out FOLDER]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

from _reporting import Bars, Report, arguments, median
from _scheduler_alone import SchedulerAlone, ours, vllms

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


@dataclass(frozen=True)
class Case:
    """Something that grows.

    Attributes:
        engine: runs `size` of it, and is warm.
        unit: of work, for the table.
        units: in one step of `size`; None where they are counted while it runs.
        plain: the same with vLLM's scheduler and plain requests.
    """

    name: str
    size: int
    engine: Callable[[int], SchedulerAlone]
    unit: str
    units: Callable[[int], int] | None
    plain: Callable[[int], SchedulerAlone] | None = None


def main() -> int:
    parser = arguments(__doc__)
    options = parser.parse_args()
    steps = 400 if options.full else 100
    most = 40 if options.full else 20
    length = 2000 if options.full else 400
    columns = ("what grows", "from", "to", "us per unit", "us at 10 x", "ratio", "vLLM's ratio", "unit")
    report = Report("growth", "host time of one unit of work, CPU time of one thread, medians", columns)
    cases = [
        Case("branches of one request", most // 2, branches, "branch and step", lambda size: size),
        Case("requests with a controller", most, scripts, "request and step", lambda size: size, requests),
        Case("splices at once", most // 2, splices, "splice", None),
        Case("tokens of a sequence", length, tokens, "step", lambda size: 1, plain_tokens),
    ]
    for case in cases:
        small, large = pair(case, case.engine, steps)
        vllm = pair(case, case.plain, steps) if case.plain is not None else None
        ratios = large / small, vllm and vllm[1] / vllm[0]
        report.rows.append(
            [case.name, case.size, 10 * case.size, small * 1e6, large * 1e6, *ratios, case.unit]
        )
    report.notes.append("a ratio of 1 is linear growth; less is better than linear")
    report.show()
    groups = [(row[0], (row[3], row[4])) for row in report.rows]
    report.write(options.out, Bars(("small", "10 x"), groups, "us"))
    return 0


def pair(case: Case, make: Callable[[int], SchedulerAlone], steps: int) -> tuple[float, float]:
    """Seconds for a unit, and for a unit at ten times the size."""
    engines = make(case.size), make(10 * case.size)
    gc.collect()
    gc.freeze()
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for which, engine in enumerate(engines):
            before = engine.splices if case.units is None else 0
            seconds = engine.step()
            done = case.units(case.size * (10 if which else 1)) if case.units else engine.splices - before
            if done:
                spent[which].append(seconds / done)
    return median(spent[0]), median(spent[1])


def branches(count: int) -> SchedulerAlone:
    """One request with `count` branches."""
    engine = ours(count, 700, branches=count)
    engine.add(fork_wide, MAX_TOKENS, arg=str(count))
    return warm(engine)


def scripts(count: int) -> SchedulerAlone:
    """`count` requests with a script each."""
    engine = ours(count, 700)
    for _ in range(count):
        engine.add(words, MAX_TOKENS)
    return warm(engine)


def requests(count: int) -> SchedulerAlone:
    """`count` plain requests."""
    engine = vllms(count, 700)
    for _ in range(count):
        engine.add(None, MAX_TOKENS)
    return warm(engine)


def splices(count: int) -> SchedulerAlone:
    """`count` requests, each spliced after every token."""
    engine = ours(count, 2500)
    for _ in range(count):
        engine.add(splice, MAX_TOKENS)
    return warm(engine)


def tokens(length: int) -> SchedulerAlone:
    """8 requests with a script, whose sequences are `length` tokens long."""
    engine = ours(8, length + 700)
    for _ in range(8):
        engine.add(words, MAX_TOKENS)
    return warm(engine, length)


def plain_tokens(length: int) -> SchedulerAlone:
    """8 plain requests, whose sequences are `length` tokens long."""
    engine = vllms(8, length + 700)
    for _ in range(8):
        engine.add(None, MAX_TOKENS)
    return warm(engine, length)


def warm(engine: SchedulerAlone, steps: int = 30) -> SchedulerAlone:
    """The engine past its first steps."""
    for _ in range(steps):
        engine.step()
    return engine


if __name__ == "__main__":
    sys.exit(main())
