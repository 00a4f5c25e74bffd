"""Time to first mask and time per mask of this library and of its peers, in one run on one thread.

    python benchmarks/masks.py                 one minute: 49,152 tokens, 100 sequences a source
    python benchmarks/masks.py --full          32,768, 49,152 and 131,072 tokens, 1,000 sequences a source:
                                               fifteen minutes

Every engine masks the same token sequences, some at a time and in turn, so that what else the machine does
falls on all of them. A step is: take the token, give the mask. The first mask includes compiling. Patterns
are written so that all engines read them alike. The vocabularies are prefixes of Mistral's tekken, which is
ordered by rank. Results are printed, and written as a table, as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import mistral_common
import numpy as np
from _mask_engines import ENGINES, Engine, Sequences, Source
from _reporting import arguments, machine
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from constraints import ConstraintError, TokenSet, Vocabulary, json_schema, prepare, regex
from constraints.byte_rows import byte_rows_of
from constraints.index import builder
from constraints.machine import MAX_ALL_STATES, compiled
from constraints.masks import masks

PATTERNS = {
    "letters": r"[a-z ]+",
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}",
    "choice": r"(yes|no|maybe|certainly not)",
    "string": r'"[^"\n]*"',
    "email": r"[A-Za-z0-9_.+-]+@[A-Za-z0-9_-]+\.[a-z]{2,4}",
    "line": r"[^\n]{1,100}",
    "names": r"[A-Z][a-z]+( [A-Z][a-z]+){1,5}",
    "ambiguous": r"(a+)+b",
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICE = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog", "fish"]}, "ok": {"type": "boolean"}},
    "required": ["kind"],
}
NODE = {
    "type": "object",
    "properties": {"v": {"type": "number"}, "c": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
}
SCHEMAS = {"person": PERSON, "kind": CHOICE, "tree": {"$defs": {"n": NODE}, "$ref": "#/$defs/n"}}

OURS = "this library"
LIMIT_SECONDS = 2.0
"""A peer that takes longer over the sequences of one source is cut off there; its times so far count."""
FIRST_TIMES = 15
"""First masks of one source by one engine, of which the median counts; one only where it takes long."""
LONG_FIRST = 0.05
IN_TURN = 20
"""Sequences that one engine takes before the next one's turn."""
EVICTING = np.zeros(8 * 2**20, np.int64)
"""64 MiB that are changed before every first mask: between requests a model runs, and caches are cold."""
LONGEST = 24
"""Tokens of a sequence."""


@dataclass
class Times:
    """Seconds of one engine over one source."""

    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    failure: str = ""


Results = dict[int, dict[Source, dict[str, Times]]]


def sequences_of(vocabulary: Vocabulary, source: Source, count: int) -> list[list[int]]:
    """Random walks, which now and then close a string or an object."""
    random, found = Random(0), []
    texts = (b'"', b"}", b"]", b"@", b".", b"b")
    closers = [i for text in texts for i in vocabulary.ids_by_bytes.get(text, ())]
    for _ in range(count):
        constraint = (json_schema if source.is_schema else regex)(vocabulary, source.text)
        tokens: list[int] = []
        while len(tokens) < LONGEST and not constraint.eos_forced():
            allowed = TokenSet(vocabulary.size, row=constraint.mask_row() & ~vocabulary.eos_row)
            ready = [token for token in closers if allowed[token]]
            ids = allowed.ids()
            if not len(ids):
                break
            close = ready and random.random() < 0.3
            tokens.append(random.choice(ready) if close else int(ids[random.randrange(len(ids))]))
            constraint.append_token(tokens[-1])
        found.append(tokens)
    return found


@dataclass(frozen=True)
class Clock:
    """What time is: of the wall, or of the processor where others keep the machine busy."""

    first: Callable[[], float]
    step: Callable[[], float]


# A first mask may be made by several threads, a step is made by this one.
CLOCKS = {
    "wall": Clock(time.perf_counter, time.perf_counter),
    "cpu": Clock(time.process_time, time.thread_time),
}


def forget() -> None:
    """What this library remembers of other runs would make its first masks too good."""
    masks.clear()
    compiled.clear()


def measure_first(engine: Engine, source: Source, times: Times, clock: Clock) -> Sequences | None:
    """Compile and mask once. None when the engine refuses the source."""
    forget()
    # What is left of others is thrown away now, not while the time is taken.
    gc.collect()
    EVICTING.__iadd__(1)
    start = clock.first()
    try:
        sequences = engine(source)
        sequences()(None)
    except (ConstraintError, ValueError, RuntimeError, TypeError) as error:
        times.failure = str(error).splitlines()[0][:100]
        return None
    times.first.append(clock.first() - start)
    return sequences


def measure_steps(sequences: Sequences, chosen: list[list[int]], times: Times, clock: Clock) -> None:
    now = clock.step
    for tokens in chosen:
        step = sequences()
        for token in (None, *tokens):
            before = now()
            taken = step(token)
            after = now()
            if not taken:
                break
            times.steps.append(after - before)


def measure(
    engines: dict[str, Engine], source: Source, tokens: list[list[int]], clock: Clock, limit: float
) -> dict[str, Times]:
    """Every engine over one source."""
    found = {name: Times() for name in engines}
    ready: dict[str, Sequences] = {}
    for turn in range(FIRST_TIMES):
        for name, engine in engines.items():
            times = found[name]
            if turn and (times.failure or times.first[0] > LONG_FIRST):
                continue
            sequences = measure_first(engine, source, times, clock)
            if sequences:
                ready[name] = sequences
    forget()
    for begin in range(0, len(tokens), IN_TURN):
        for name, sequences in ready.items():
            if name == OURS or sum(found[name].steps) < limit:
                measure_steps(sequences, tokens[begin : begin + IN_TURN], found[name], clock)
    return found


def run(
    vocabulary: Vocabulary, chosen: argparse.Namespace, memory: list[dict[str, int]]
) -> dict[Source, dict[str, Times]]:
    """Times by source and engine. `memory` takes what this library holds after each source."""
    sources = [Source(name, text, False) for name, text in PATTERNS.items()]
    sources += [Source(name, json.dumps(schema), True) for name, schema in SCHEMAS.items()]
    engines = {name: make(vocabulary) for name, make in ENGINES.items()}
    # What belongs to the vocabulary alone is made when a server starts.
    prepare(vocabulary)
    # What lives as long as the run need not be looked at by every collection.
    gc.collect()
    gc.freeze()
    found: dict[Source, dict[str, Times]] = {}
    for source in sources:
        tokens = sequences_of(vocabulary, source, chosen.sequences)
        found[source] = measure(engines, source, tokens, CLOCKS[chosen.clock], chosen.limit)
        print(f"  {source.name}: {shown(quantiles(found[source][OURS].steps))} µs", flush=True)
        rows = byte_rows_of(vocabulary).num_bytes()
        memory.append({"masks": masks.num_bytes, "states": compiled.num_states(), "rows": rows})
        builder.wait()
        for name, times in found[source].items():
            if times.failure:
                print(f"  {name} cannot run {source.name}: {times.failure}")
    gc.unfreeze()
    return found


# Reports --------------------------------------------------------------------------------------------------


def quantiles(values: list[float]) -> list[float]:
    """p50, p99 and max in microseconds."""
    return [round(float(q) * 1e6, 2) for q in np.quantile(values, [0.5, 0.99, 1.0])] if values else []


def shown(values: list[float]) -> str:
    return " / ".join(f"{value:,.1f}" for value in values) or "-"


def firsts(by_source: dict[Source, dict[str, Times]], name: str, kind: str | None = None) -> list[float]:
    """The median time to first mask of each source."""
    chosen = [t[name].first for s, t in by_source.items() if t[name].first and kind in (None, s.kind)]
    return [float(np.median(times)) for times in chosen]


def pooled(by_source: dict[Source, dict[str, Times]], name: str, kind: str) -> list[float]:
    return [second for s, t in by_source.items() if s.kind == kind for second in t[name].steps]


def table(results: Results) -> str:
    lines = [
        "| tokens | source | engine | first mask µs: p50 / p99 / max | step: p50 / p99 / max | mean | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, by_source in results.items():
        for kind in ("regex", "JSON"):
            for name in ENGINES:
                steps = pooled(by_source, name, kind)
                cells = [
                    f"{size:,}",
                    kind,
                    name,
                    shown(quantiles(firsts(by_source, name, kind))),
                    shown(quantiles(steps)),
                    f"{np.mean(steps) * 1e6:,.1f}" if steps else "-",
                    f"{len(steps):,}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(results: Results) -> str:
    """By source: this library's time as a share of the best peer's at that quantile."""
    lines = [
        "| tokens | source | first mask | step p50 | step p99 |",
        "|---|---|---|---|---|",
    ]
    for size, by_source in results.items():
        for source, engines in by_source.items():
            peers = [t for name, t in engines.items() if name != OURS and t.steps]
            mine = engines[OURS]
            shares = [float(np.median(mine.first)) / min(float(np.median(t.first)) for t in peers)]
            for q in (0.5, 0.99):
                best = min(float(np.quantile(t.steps, q)) for t in peers)
                shares.append(float(np.quantile(mine.steps, q)) / best)
            lines.append(f"| {size:,} | {source.name} | " + " | ".join(f"{s:.2f}" for s in shares) + " |")
        mine_first = float(np.quantile(firsts(by_source, OURS), 0.99))
        best_first = min(float(np.quantile(firsts(by_source, n), 0.99)) for n in ENGINES if n != OURS)
        lines.append(f"| {size:,} | first masks of all sources, p99 | {mine_first / best_first:.2f} | | |")
    return "\n".join(lines)


def about(clock: str) -> str:
    """What this ran on, and how time was taken."""
    names = ("llguidance", "xgrammar", "outlines_core", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{machine()['summary']}, {versions}. Times are of the {clock} clock."


def caches(memory: list[dict[str, int]], folder: Path) -> str:
    """The memory of this library's caches, and its files."""
    held = max(entry["masks"] for entry in memory)
    states = max(entry["states"] for entry in memory)
    rows = max(entry["rows"] for entry in memory)
    files = [path.stat().st_size for path in folder.glob("index-*")]
    return (
        f"Caches: masks {held / 2**20:.1f} MiB at most, of {masks.max_bytes / 2**20:.0f} MiB allowed;"
        f" {states:,} states of machines at most, of {MAX_ALL_STATES:,};"
        f" rows of tokens by their bytes {rows / 2**20:.1f} MiB for the largest vocabulary;"
        f" {len(files) // 2} indexes on disk, {sum(files) / 2**20:.1f} MiB."
    )


def plot(results: Results) -> str:
    """An SVG of the p99 of a step, one bar for each engine, on a logarithmic scale from 0.1 µs to 1 s."""
    colors = dict(
        zip(
            ENGINES,
            ("#2563eb", "#9ca3af", "#d97706", "#059669", "#d1d5db", "#fbbf24", "#6ee7b7"),
            strict=True,
        )
    )
    bars, y = [], 40
    for size, by_source in results.items():
        for kind in ("regex", "JSON"):
            bars.append(f'<text x="10" y="{y}" font-weight="bold">{size:,} tokens, {kind}</text>')
            for name in ENGINES:
                steps = pooled(by_source, name, kind)
                y += 18
                value = float(np.quantile(steps, 0.99)) * 1e6 if steps else 0.1
                width = max(1.0, (np.log10(max(value, 0.1)) + 1) * 75)
                bars.append(f'<text x="10" y="{y}">{name}</text>')
                bars.append(
                    f'<rect x="130" y="{y - 11}" width="{width:.0f}" height="13" fill="{colors[name]}"/>'
                )
                bars.append(f'<text x="{135 + width:.0f}" y="{y}">{value:,.1f} µs</text>')
            y += 30
    size_of_all = f'width="760" height="{y}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size_of_all}>'
    title = '<text x="10" y="18" font-size="14">Take a token and make the mask: p99, logarithmic</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', title, *bars, "</svg>\n"])


def as_json(results: Results, ran_on: str, memory: list[dict[str, int]]) -> str:
    found: dict[str, Any] = {"machine": ran_on, "memory": memory, "unit": "µs: p50, p99, max", "sizes": {}}
    for size, by_source in results.items():
        found["sizes"][size] = {
            source.name: {
                name: {
                    "first": quantiles(times.first),
                    "step": quantiles(times.steps),
                    "steps": len(times.steps),
                    **({"failure": times.failure} if times.failure else {}),
                }
                for name, times in engines.items()
            }
            for source, engines in by_source.items()
        }
    return json.dumps(found, indent=1)


def options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, help="sequences a source")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens of the vocabularies")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others load the machine")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for a peer and a source")
    chosen = parser.parse_args()
    chosen.sequences = chosen.sequences or (1000 if chosen.full else 100)
    chosen.sizes = chosen.sizes or ([32_768, 49_152, 131_072] if chosen.full else [49_152])
    return chosen


def main() -> None:
    chosen = options()
    # vLLM logs every token that a backend refuses; here refusals end a sequence and are counted.
    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    data = Path(mistral_common.__file__).parent / "data"
    tekken = Vocabulary.from_tokenizer(Tekkenizer.from_file(data / "tekken_240911.json"))
    results: Results = {}
    memory: list[dict[str, int]] = []
    with TemporaryDirectory() as folder:
        # Indexes of an earlier run would make the first masks of this one too good.
        builder.folder = Path(folder)
        os.environ["OUTLINES_CACHE_DIR"] = folder
        for size in chosen.sizes:
            print(f"{size:,} tokens", flush=True)
            specials = {i: tekken.token_text(i) for i in range(1000)}
            tokens = [tekken.token_bytes(i) for i in range(size)]
            vocabulary = Vocabulary(tokens, specials=specials, eos_token_ids=[2], bos_token_id=1)
            results[size] = run(vocabulary, chosen, memory)
            report(chosen, results, memory, Path(folder))


def report(chosen: argparse.Namespace, results: Results, memory: list[dict[str, int]], folder: Path) -> None:
    """Print and write what is known so far: a long run that is stopped leaves its finished sizes."""
    ran_on = about(chosen.clock)
    text = "\n\n".join([table(results), goals(results), caches(memory, folder), ran_on])
    print(text, flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "masks.md").write_text(text + "\n")
    (chosen.out / "masks.json").write_text(as_json(results, ran_on, memory) + "\n")
    (chosen.out / "masks.svg").write_text(plot(results))


if __name__ == "__main__":
    main()
