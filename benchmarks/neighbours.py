"""Token times of two well-behaved requests, with and without hostile scripts beside them on one engine.

For each hostile script, windows without it and windows with it alternate: `--attackers` clients run it again
and again, while a plain request and a controlled one go on generating. Prints the time between two of their
tokens, p50 and p99 over all windows of a kind, and the ratio of the two p99. The rows in brackets say how to
read it: `(nobody)` compares quiet windows with quiet ones, so it shows what chance does to the ratio; others
run good scripts in the attackers' place, so they show what so many clients or branches cost anyway.

The model is the embedded one with its first `--layers` layers: on two cores a step then takes about as long
as one of a larger model on a GPU.

    python benchmarks/neighbours.py [--full] [--layers 8] [--seconds N] [--rounds 3] [--attackers 4]
        [--out FOLDER]

On a machine lent in pieces: `--part 1/3 --json a.json` and so on, then `--merge a.json b.json c.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _reporting import Bars, Report, arguments, quantile

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

CONTROLS = {
    "(nobody)": None,
    "(harmless)": """
import aici

async def main():
    await aici.FixedTokens("Once")
    await aici.gen_tokens(max_tokens=20)

aici.start(main)
""",
    "(harmless and brief)": """
import aici

async def main():
    await aici.FixedTokens("Once")

aici.start(main)
""",
    "(harmless, 16 at once)": """
import aici

async def main():
    await aici.fork(16)
    await aici.gen_tokens(max_tokens=1)

aici.start(main)
""",
}
"""What stands in the place of an attacker, to compare with."""
LEAD = 0.2
"""Seconds between the first request of the attackers and the window."""


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
    """Seconds between tokens of a neighbour, without and with attackers."""

    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)

    def ratio(self, percent: int) -> float:
        """Infinite where the neighbour got no token beside attackers."""
        if not self.attacked:
            return math.inf
        return quantile(self.attacked, percent / 100) / quantile(self.quiet, percent / 100)


@dataclass
class Found:
    """What one attacker did to each neighbour."""

    attacks: Attacks = field(default_factory=Attacks)
    windows: dict[str, Windows] = field(default_factory=dict)


def attackers_of(options: argparse.Namespace) -> dict[str, str | None]:
    """Name → source, or nothing for the row in which nobody attacks."""
    scripts = {path.stem: path.read_text() for path in sorted(HOSTILE.glob("*.py"))}
    part, parts = map(int, options.part.split("/"))
    chosen = list(scripts)[part - 1 :: parts] if not options.only else options.only
    return CONTROLS | {name: scripts[name] for name in chosen}


async def measure(options: argparse.Namespace, model: str) -> dict[str, Found]:
    """Windows by attacker and neighbour, and how the attackers fared."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import aici_vllm

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model,
            dtype="float32" if not _on_gpu() else "auto",
            enforce_eager=not _on_gpu(),
            max_model_len=1024,
            disable_log_stats=True,
            **aici_vllm.engine_args(branches=options.branches),
        )
    )
    neighbours = [Neighbour("plain", False), Neighbour("controlled", True)]
    running = [asyncio.create_task(neighbour.run(engine)) for neighbour in neighbours]
    found: dict[str, Found] = {}
    try:
        await asyncio.sleep(5)
        for name, source in attackers_of(options).items():
            one = found[name] = Found()
            for neighbour in neighbours:
                one.windows[neighbour.name] = Windows()
            for number in range(options.rounds):
                await _window(neighbours, one, options.seconds, attacked=False)
                attackers = [
                    asyncio.create_task(attack(engine, source, f"{name}-{number}-{i}", one.attacks))
                    for i in range(options.attackers if source is not None else 0)
                ]
                # All of them begin at once here, and never again.
                await asyncio.sleep(LEAD)
                await _window(neighbours, one, options.seconds, attacked=True)
                for task in attackers:
                    task.cancel()
                await asyncio.gather(*attackers, return_exceptions=True)
                # What the attackers left behind ends.
                await asyncio.sleep(2 * LEAD)
            for task in running:
                if task.done():
                    task.result()
            write(found, options.json)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        engine.shutdown()
    return found


async def _window(neighbours: list[Neighbour], found: Found, seconds: float, attacked: bool) -> None:
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    end = time.perf_counter()
    for neighbour in neighbours:
        windows = found.windows[neighbour.name]
        (windows.attacked if attacked else windows.quiet).extend(neighbour.gaps(start, end))


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def reported(found: dict[str, Found]) -> Report:
    """A row for each attacker and neighbour; the notes say who slowed one down by more than the goal."""
    columns = (
        *("attacker", "attacks", "neighbour", "tokens"),
        *("p50", "p50 attacked", "p99", "p99 attacked", "ratio of p99"),
    )
    report = Report("neighbours", "time between two tokens of a neighbour (ms)", columns)
    everything: dict[str, Windows] = {}
    beyond = []
    for attacker, one in found.items():
        runs = f"{one.attacks.began} + {one.attacks.refused} refused"
        for name, windows in one.windows.items():
            report.rows.append(_row(attacker, runs, name, windows))
            if attacker not in CONTROLS:
                together = everything.setdefault(name, Windows())
                together.quiet += windows.quiet
                together.attacked += windows.attacked
                if windows.ratio(99) > GOAL:
                    beyond.append(f"{attacker} ({name}: {windows.ratio(99):.2f})")
    for name, windows in everything.items():
        report.rows.append(_row("all", str(sum(one.attacks.began for one in found.values())), name, windows))
    report.notes.append(f"p99 beside attackers over {GOAL} times that without: {', '.join(beyond) or 'none'}")
    return report


def _row(attacker: str, runs: str, name: str, windows: Windows) -> list[Any]:
    cells = [
        1000 * quantile(values, part) if values else None
        for part in (0.5, 0.99)
        for values in (windows.quiet, windows.attacked)
    ]
    return [attacker, runs, name, len(windows.attacked), *cells, windows.ratio(99)]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the embedded model")
    parser.add_argument("--seconds", type=float, help="of each window")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind for each script")
    parser.add_argument("--attackers", type=int, default=4, help="hostile requests at the same time")
    parser.add_argument("--branches", type=int, default=16, help="live branches that a request may have")
    parser.add_argument("--only", nargs="*", help="names of hostile scripts")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the scripts")
    parser.add_argument("--json", type=Path, help="file for what a later run with --merge shows")
    parser.add_argument("--merge", type=Path, nargs="*", help="files of earlier parts: show them together")
    options = parser.parse_args()
    options.seconds = options.seconds or (5 if options.full else 1.2)
    found = read(options.merge) if options.merge else run(options)
    report = reported(found)
    report.show()
    bars = [(f"{row[0]}, {row[2]}", (row[-1],)) for row in report.rows if math.isfinite(row[-1])]
    report.write(options.out, Bars(("p99 beside the attacker, of that without",), bars, "x", GOAL))
    write(found, options.json)
    return 0


def write(found: dict[str, Found], path: Path | None) -> None:
    """Keep what was found so far: a run may be broken off."""
    if path is not None:
        path.write_text(json.dumps({name: asdict(one) for name, one in found.items()}))


def run(options: argparse.Namespace) -> dict[str, Found]:
    """Measure."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        cut_model(Path(folder), options.layers)
        return asyncio.run(measure(options, folder))


def cut_model(folder: Path, layers: int) -> None:
    """Write the embedded model without its later layers."""
    from safetensors.numpy import load_file, save_file

    from aici_vllm.model import embedded_model

    for path in embedded_model().iterdir():
        if path.suffix == ".safetensors":
            later = re.compile(r"model\.layers\.(\d+)\.")
            kept = {
                name: weights
                for name, weights in load_file(path).items()
                if (found := later.match(name)) is None or int(found[1]) < layers
            }
            save_file(kept, folder / path.name, metadata={"format": "pt"})
        elif path.name == "config.json":
            config = json.loads(path.read_text()) | {"num_hidden_layers": layers}
            (folder / path.name).write_text(json.dumps(config))
        elif path.is_file():
            shutil.copy(path, folder)


def read(paths: list[Path]) -> dict[str, Found]:
    """What other runs have found; windows of the same attacker are put together."""
    found: dict[str, Found] = {}
    for path in paths:
        for attacker, one in json.loads(path.read_text()).items():
            total = found.setdefault(attacker, Found())
            total.attacks.began += one["attacks"]["began"]
            total.attacks.refused += one["attacks"]["refused"]
            for name, windows in one["windows"].items():
                together = total.windows.setdefault(name, Windows())
                together.quiet += windows["quiet"]
                together.attacked += windows["attacked"]
    return found


if __name__ == "__main__":
    sys.exit(main())
