"""Host time that controlled sequences add to a step, and bytes that a step sends to the workers.

vLLM's scheduler runs as the engine core runs it, at a vocabulary of 131,072 tokens, with nobody computing:
the plugin's with controlled requests, the unmodified one with as many plain requests, a step of each in
turn. What the plugin's logits processor adds before it calls the device is counted too. Times are CPU time of
one thread.

    python benchmarks/host_step.py [--full] [--sequences 1 10 40 256] [--profile FILE] [--out FOLDER]
"""

from __future__ import annotations

import cProfile
import gc
import os
import pickle
import pstats
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _reporting import Bars, Report, arguments, median, quantile
from _scheduler_alone import Controller, SchedulerAlone, ours, tekken, vllms
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput

from aici_vllm import aici
from aici_vllm.engine.logits import AiciLogitsProcessor
from aici_vllm.engine.masks import LANE, StepMasks

GOALS = {10: 0.05, 40: 0.15, 256: 1.0}
"""Sequences → milliseconds that a step may take longer."""
MAX_TOKENS = 60_000
WARM_UP = 60


async def words() -> None:
    """A few states, each met by many sequences."""
    await aici.gen_tokens(regex=r"([A-Z]?[a-z]+( [a-z0-9]+)*[,.;!?]? )*", max_tokens=MAX_TOKENS)


async def anything() -> None:
    """No constraint at all."""
    await aici.gen_tokens(max_tokens=MAX_TOKENS)


async def json_strings() -> None:
    """JSON texts, one after the other, whose punctuation is partly forced."""
    schema = {"type": "array", "items": {"type": "string"}}
    while True:
        await aici.gen_tokens(json_schema=schema, max_tokens=MAX_TOKENS)


KINDS: dict[str, Controller] = {"regex": words, "any text": anything, "JSON": json_strings}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 10, 40, 256])
    parser.add_argument("--profile", type=Path, help="write a table of where the plugin's steps spend time")
    options = parser.parse_args()
    steps = 1000 if options.full else 250
    columns = (
        "sequences",
        "kind",
        "vLLM ms",
        "added ms",
        "p10 added",
        "worker ms",
        "goal ms",
        "met",
        "bytes",
        "vLLM bytes",
    )
    report = Report("host_step", "host time of a step, CPU time of one thread, medians", columns)
    speed = loop_nanoseconds()
    report.notes.append(
        f"one turn of an empty Python loop took {speed:.0f} ns before and ",
    )
    for count in options.sequences:
        for kind, controller in KINDS.items():
            if kind == "regex" or options.full:
                report.rows.append(measure(count, kind, controller, steps))
    if options.profile:
        options.profile.write_text(profile(max(options.sequences)))
    report.notes[-1] += f"{loop_nanoseconds():.0f} ns after: on a quiet core of this kind some 25 ns"
    report.notes.append(
        "p10 added: of the fastest tenth of the steps, ours less vLLM's: less of the noise of a busy machine"
    )
    report.show()
    groups = [(f"{row[0]} {row[1]}", (row[3] + row[5], row[6])) for row in report.rows]
    report.write(options.out, Bars(("added by the plugin", "goal"), groups, "ms"))
    return 0


def measure(count: int, kind: str, controller: Controller, steps: int) -> list[Any]:
    """A row of the table."""
    mine, plain = engines(count, controller, steps)
    mines, theirs = [], []
    for _ in range(steps):
        theirs.append(plain.step())
        mines.append(mine.step())
    added = [a - b for a, b in zip(mines, theirs, strict=True)]
    known = [masks for masks in mine.masks[WARM_UP:] if masks is not None and masks.new_rows is None]
    sent = [len(pickle.dumps(masks, 5)) - len(pickle.dumps(empty_masks(), 5)) for masks in known]
    worker = worker_seconds(count, known)
    goal = GOALS.get(count)
    total = (median(added) + worker) * 1e3
    return [
        count,
        kind,
        median(theirs) * 1e3,
        median(added) * 1e3,
        (quantile(mines, 0.1) - quantile(theirs, 0.1)) * 1e3,
        worker * 1e3,
        goal,
        "-" if goal is None else "yes" if total <= goal else "no",
        median(sent) if sent else None,
        bitmask_bytes(count),
    ]


def engines(count: int, controller: Controller, steps: int) -> tuple[SchedulerAlone, SchedulerAlone]:
    """Both schedulers with as many requests, past their first steps."""
    mine, plain = ours(count, steps + WARM_UP + 64), vllms(count, steps + WARM_UP + 64)
    for _ in range(count):
        mine.add(controller, MAX_TOKENS)
        plain.add(None, MAX_TOKENS)
    for _ in range(WARM_UP):
        mine.step()
        plain.step()
    # As the engine core does once it has started.
    gc.collect()
    gc.freeze()
    return mine, plain


class _NoDevice:
    """Takes masks and applies none: what is left is the host's part."""

    def write(self, slots: list[int], rows: np.ndarray) -> None:
        pass

    def apply(self, logits: torch.Tensor, slots: np.ndarray) -> None:
        pass


def worker_seconds(count: int, steps: list[StepMasks]) -> float:
    """Median host time of the logits processor for one step, up to where it calls the device."""
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=count),
        parallel_config=SimpleNamespace(worker_cls="auto"),
    )
    processor = AiciLogitsProcessor(config, torch.device("cpu"))
    processor._masks = _NoDevice()  # type: ignore[assignment]
    for lane in range(count):
        processor.add_request(lane, SamplingParams(extra_args={LANE: lane}))
    logits, context = torch.zeros(count, 1), SimpleNamespace(idx_mapping_np=np.arange(count))
    spent = []
    for step in steps:
        began = time.thread_time_ns()
        processor.install(step)
        processor.apply(logits, context)  # type: ignore[arg-type]
        spent.append((time.thread_time_ns() - began) / 1e9)
    return median(spent) if spent else 0.0


def empty_masks() -> StepMasks:
    return StepMasks(None, np.empty(0, np.int32))


def bitmask_bytes(count: int) -> int:
    """What vLLM sends for as many of its own structured outputs, beyond an empty message."""
    words = -(-tekken().size // 32)
    empty = GrammarOutput([], np.empty((0, words), np.int32), [])
    ids = [f"request-{index:06d}-0123456789abcdef" for index in range(count)]
    full = GrammarOutput(ids, np.zeros((count, words), np.int32), [0] * count)
    return len(pickle.dumps(full, 5)) - len(pickle.dumps(empty, 5))


def profile(count: int) -> str:
    """Where the plugin's steps spend their time, by function."""
    mine, _ = engines(count, words, 200)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(200):
        mine.step()
    profiler.disable()
    path = Path(os.devnull)
    with path.open("w") as nowhere:
        stats = pstats.Stats(profiler, stream=nowhere).sort_stats("tottime")
    total = stats.total_tt  # type: ignore[attr-defined]
    lines = []
    for place, (_, calls, own, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        file, line, name = place
        short = "/".join(Path(file).parts[-3:])
        lines.append((own, f"{own / total:6.1%} {cumulative / total:6.1%} {calls:8d}  {short}:{line} {name}"))
    ordered = [text for _, text in sorted(lines, reverse=True)[:60]]
    return "\n".join(["  own   with    calls  where", *ordered]) + "\n"


def loop_nanoseconds() -> float:
    """How fast this core is just now: a turn of an empty loop."""
    found = []
    for _ in range(20):
        began = time.thread_time_ns()
        for _ in range(10_000):
            pass
        found.append((time.thread_time_ns() - began) / 10_000)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
