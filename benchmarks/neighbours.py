"""Token times of two well-behaved requests, with and without hostile scripts beside them on one engine.

For each hostile script, a window without it and a window with it alternate: `--attackers` requests run it
again and again, while a plain request and a controlled one go on generating. Prints the time between two of
their tokens, p50 and p99 of both windows, and the ratio of all windows together.

    python benchmarks/neighbours.py [--model FOLDER] [--seconds 2] [--rounds 1] [--attackers 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = ROOT / "tests" / "controller" / "hostile"
GOAL = 1.5
WELL_BEHAVED = """
import aici

async def main():
    while True:
        await aici.gen_tokens(max_tokens=20)
        await aici.FixedTokens(" and")

aici.start(main)
"""


@dataclass
class Neighbour:
    """A request that goes on for ever, begun again whenever it ends; `times` are those of its tokens."""

    name: str
    controlled: bool
    times: list[float] = field(default_factory=list)

    async def run(self, engine: Any) -> None:
        for number in itertools.count():
            async for output in engine.generate(
                "The first neighbour", self._params(), f"{self.name}-{number}"
            ):
                if output.outputs[0].token_ids:
                    self.times.append(time.perf_counter())

    def _params(self) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        import aici_vllm

        plain = SamplingParams(
            max_tokens=900, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        return aici_vllm.request_params(WELL_BEHAVED, sampling_params=plain) if self.controlled else plain

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens that came in a window."""
        inside = [at for at in self.times if start <= at <= end]
        return [after - before for before, after in itertools.pairwise(inside)]


@dataclass
class Attacks:
    """How often a script began to run, and how often it was refused before it did."""

    began: int = 0
    refused: int = 0


async def attack(engine: Any, source: str, name: str, attacks: Attacks) -> None:
    """Run a script again and again."""
    from vllm.sampling_params import SamplingParams

    import aici_vllm

    for number in itertools.count():
        params = aici_vllm.request_params(
            source, sampling_params=SamplingParams(max_tokens=200, temperature=0)
        )
        attacks.began += 1
        try:
            async for _ in engine.generate("An attack", params, f"{name}-{number}"):
                pass
        except ValueError:
            # A client that is refused at once may ask again as fast as it can.
            attacks.began -= 1
            attacks.refused += 1
            await asyncio.sleep(0.001)


@dataclass
class Windows:
    """The gaps between tokens of a neighbour, without and with attackers."""

    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)

    def ratio(self, percent: int) -> float:
        return percentile(self.attacked, percent) / percentile(self.quiet, percent)


def percentile(values: list[float], percent: int) -> float:
    """Of sorted values, the one that `percent` in a hundred do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


async def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict[str, Windows]], dict[str, Attacks]]:
    """Windows by attacker and neighbour, and how the attackers fared."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import aici_vllm

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(arguments.model),
            dtype="float32" if not _on_gpu() else "auto",
            enforce_eager=not _on_gpu(),
            max_model_len=1024,
            disable_log_stats=True,
            **aici_vllm.engine_args(),
        )
    )
    neighbours = [Neighbour("plain", False), Neighbour("controlled", True)]
    running = [asyncio.create_task(neighbour.run(engine)) for neighbour in neighbours]
    found: dict[str, dict[str, Windows]] = {}
    attacks: dict[str, Attacks] = {}
    try:
        await asyncio.sleep(3)
        for path in sorted(HOSTILE.glob("*.py")):
            if arguments.only and path.stem not in arguments.only:
                continue
            found[path.stem] = {neighbour.name: Windows() for neighbour in neighbours}
            tally = attacks[path.stem] = Attacks()
            for _ in range(arguments.rounds):
                await _window(neighbours, found[path.stem], arguments.seconds, attacked=False)
                attackers = [
                    asyncio.create_task(attack(engine, path.read_text(), f"{path.stem}-{i}", tally))
                    for i in range(arguments.attackers)
                ]
                await _window(neighbours, found[path.stem], arguments.seconds, attacked=True)
                for task in attackers:
                    task.cancel()
                await asyncio.gather(*attackers, return_exceptions=True)
                # What the attackers left behind ends.
                await asyncio.sleep(0.5)
            for task in running:
                if task.done():
                    task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        engine.shutdown()
    return found, attacks


async def _window(
    neighbours: list[Neighbour], windows: dict[str, Windows], seconds: float, attacked: bool
) -> None:
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    end = time.perf_counter()
    for neighbour in neighbours:
        gaps = neighbour.gaps(start, end)
        (windows[neighbour.name].attacked if attacked else windows[neighbour.name].quiet).extend(gaps)


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def show(found: dict[str, dict[str, Windows]], attacks: dict[str, Attacks]) -> dict[str, float]:
    """Print the table; the ratio of p99 over all attackers, by neighbour."""
    table = Table(title="time between two tokens of a neighbour (ms)")
    for column in ("attacker", "attacks", "neighbour", "p50", "attacked", "p99", "attacked", "ratio"):
        table.add_column(column, justify="left" if column in ("attacker", "neighbour") else "right")
    runs = {name: f"{tally.began} + {tally.refused} refused" for name, tally in attacks.items()}
    everything: dict[str, Windows] = {}
    for attacker, windows in found.items():
        for name, window in windows.items():
            together = everything.setdefault(name, Windows())
            together.quiet += window.quiet
            together.attacked += window.attacked
            _row(table, attacker, runs[attacker], name, window)
    for name, window in everything.items():
        _row(table, "all", str(sum(tally.began for tally in attacks.values())), name, window)
    Console(width=120).print(table)
    return {name: window.ratio(99) for name, window in everything.items()}


def _row(table: Table, attacker: str, runs: str, name: str, window: Windows) -> None:
    if not window.quiet or not window.attacked:
        table.add_row(attacker, runs, name, "no token", "", "", "", "")
        return
    cells = [
        1000 * percentile(values, percent)
        for percent in (50, 99)
        for values in (window.quiet, window.attacked)
    ]
    table.add_row(attacker, runs, name, *(f"{cell:.2f}" for cell in cells), f"{window.ratio(99):.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a model's folder; a tiny random one is made if there is none"
    )
    parser.add_argument("--seconds", type=float, default=2, help="of each window")
    parser.add_argument("--rounds", type=int, default=1, help="windows of each kind for each script")
    parser.add_argument("--attackers", type=int, default=4, help="hostile requests at the same time")
    parser.add_argument("--only", nargs="*", help="names of hostile scripts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from tests.engine.random_model import random_model

            arguments.model = random_model(Path(folder))
        found, attacks = asyncio.run(measure(arguments))
    ratios = show(found, attacks)
    for name, ratio in ratios.items():
        print(f"{name}: p99 with attackers is {ratio:.2f} times that without; the goal is {GOAL}")
    print(f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratios": ratios, "scripts": summary(found)}, indent=2))
    return 0


def summary(found: dict[str, dict[str, Windows]]) -> dict[str, Any]:
    """Milliseconds, for a file."""
    return {
        attacker: {
            name: {
                kind: {
                    "tokens": len(values),
                    "mean": 1000 * statistics.fmean(values),
                    "p50": 1000 * percentile(values, 50),
                    "p99": 1000 * percentile(values, 99),
                }
                for kind, values in (("quiet", window.quiet), ("attacked", window.attacked))
                if values
            }
            for name, window in windows.items()
        }
        for attacker, windows in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
