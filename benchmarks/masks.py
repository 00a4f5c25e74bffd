"""Time to first mask and time per mask of this library and of its peers, in one run on one thread.

    python benchmarks/constraints.py [--sequences 1000] [--sizes 32768 49152 131072] [--out FOLDER]

Every engine masks the same token sequences. A step is: take the token, give the mask. The first mask includes
compiling. The vocabularies are prefixes of Mistral's tekken, which is ordered by rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import mistral_common
import numpy as np
import outlines_core
import xgrammar
from llguidance import LLMatcher
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

# A script's own folder comes first on the path, and this file is named like the package that it measures.
sys.path[0] = str(Path(__file__).parents[1])

from constraints import (  # noqa: E402
    Constraint,
    ConstraintError,
    TokenSet,
    Vocabulary,
    guidance,
    json_schema,
    regex,
    regex_syntax,
)
from constraints.index import builder  # noqa: E402
from constraints.machine import compiled  # noqa: E402
from constraints.masks import masks  # noqa: E402

PATTERNS = {
    "letters": r"[a-z ]+",
    "date": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}",
    "choice": r"(yes|no|maybe|certainly not)",
    "string": r'"[^"\n]*"',
    "email": r"[\w.+-]+@[\w-]+\.[a-z]{2,4}",
    "line": r".{1,100}",
    "names": r"[A-Z][a-z]+( [A-Z][a-z]+){1,5}",
    "ambiguous": r"(a+)+b",
}
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choice": {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog", "fish"]}, "ok": {"type": "boolean"}},
        "required": ["kind"],
    },
    "tree": {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {
                    "v": {"type": "number"},
                    "c": {"type": "array", "items": {"$ref": "#/$defs/n"}},
                },
            }
        },
        "$ref": "#/$defs/n",
    },
}
LIMIT_SECONDS = 20.0
"""An engine that takes longer over one sequence set is cut off there; its times so far count."""


@dataclass
class Times:
    """Seconds: one first mask per source, and every step of every sequence."""

    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


Step = Callable[[int | None], bool]
"""Takes a token, None at the start, and makes the mask; False when the engine refuses the token."""
Engine = Callable[[str, bool], Callable[[], Step]]
"""Compiles a source (a pattern, or a schema's JSON when the flag is set) into a maker of sequences."""


def ours(vocabulary: Vocabulary) -> Engine:
    def compile_source(source: str, is_schema: bool) -> Callable[[], Step]:
        make: Callable[[], Constraint] = lambda: (json_schema if is_schema else regex)(vocabulary, source)  # noqa: E731
        make()

        def sequence() -> Step:
            constraint = make()

            def step(token: int | None) -> bool:
                if token is not None:
                    constraint.append_token(token)
                constraint.mask_row()
                return True

            return step

        return sequence

    return compile_source


def with_llguidance(vocabulary: Vocabulary) -> Engine:
    def compile_source(source: str, is_schema: bool) -> Callable[[], Step]:
        body = f"%json {source}" if is_schema else f"/{regex_syntax.render(regex_syntax.parse(source))}/"
        fresh = guidance.matcher(vocabulary, f"start: {body}{guidance.NO_FORCING}")

        def sequence() -> Step:
            at: LLMatcher = fresh.deep_copy()

            def step(token: int | None) -> bool:
                if token is not None and not at.consume_token(token):
                    return False
                np.frombuffer(at.compute_bitmask(), np.int32)
                return True

            return step

        return sequence

    return compile_source


def with_xgrammar(vocabulary: Vocabulary) -> Engine:
    spelled = [vocabulary.token_bytes(i) for i in range(vocabulary.size)]
    info = xgrammar.TokenizerInfo(
        spelled, xgrammar.VocabType.RAW, vocab_size=vocabulary.size, stop_token_ids=[2]
    )
    bits = xgrammar.allocate_token_bitmask(1, vocabulary.size)

    def compile_source(source: str, is_schema: bool) -> Callable[[], Step]:
        # A compiler of its own, because it caches what it compiled.
        compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        if is_schema:
            grammar = compiler.compile_json_schema(source, any_whitespace=True)
        else:
            grammar = compiler.compile_regex(
                source.replace(".", "[^\\n]") if source.startswith(".") else source
            )

        def sequence() -> Step:
            at = xgrammar.GrammarMatcher(grammar)

            def step(token: int | None) -> bool:
                if token is not None and not at.accept_token(token):
                    return False
                at.fill_next_token_bitmask(bits)
                return True

            return step

        return sequence

    return compile_source


def with_outlines(vocabulary: Vocabulary) -> Engine:
    by_bytes = {text: list(ids) for text, ids in vocabulary.ids_by_bytes.items()}
    words = outlines_core.Vocabulary(2, by_bytes)
    row = np.zeros(vocabulary.num_words, np.int32)

    def compile_source(source: str, is_schema: bool) -> Callable[[], Step]:
        if is_schema:
            pattern = outlines_core.json_schema.build_regex_from_schema(source)
        else:
            pattern = regex_syntax.render(regex_syntax.parse(source))
        index = outlines_core.Index(pattern, words)

        def sequence() -> Step:
            guide = outlines_core.Guide(index)

            def step(token: int | None) -> bool:
                if token is not None:
                    if not guide.accepts_tokens([token]):
                        return False
                    guide.advance(token, return_tokens=False)
                guide.write_mask_into(row.ctypes.data, row.size, row.itemsize)
                return True

            return step

        return sequence

    return compile_source


ENGINES = {
    "this library": ours,
    "llguidance": with_llguidance,
    "xgrammar": with_xgrammar,
    "outlines-core": with_outlines,
}


def sequences_of(
    vocabulary: Vocabulary, source: str, is_schema: bool, count: int, seed: int = 0
) -> list[list[int]]:
    """Random walks of at most 24 tokens, which now and then close a string or an object."""
    random, found = Random(seed), []
    closers = [
        i for text in (b'"', b"}", b"]", b"@", b".", b"b") for i in vocabulary.ids_by_bytes.get(text, ())
    ]
    for _ in range(count):
        constraint = (json_schema if is_schema else regex)(vocabulary, source)
        tokens: list[int] = []
        while len(tokens) < 24 and not constraint.eos_forced():
            allowed = TokenSet(vocabulary.size, row=constraint.mask_row() & ~vocabulary.eos_row)
            ready = [token for token in closers if allowed[token]]
            ids = allowed.ids()
            if not len(ids):
                break
            token = (
                random.choice(ready)
                if ready and random.random() < 0.3
                else int(ids[random.randrange(len(ids))])
            )
            constraint.append_token(token)
            tokens.append(token)
        found.append(tokens)
    return found


def measure(engine: Engine, source: str, is_schema: bool, sequences: list[list[int]], times: Times) -> None:
    start = time.perf_counter()
    sequence = engine(source, is_schema)
    sequence()(None)
    times.first.append(time.perf_counter() - start)
    begin = time.perf_counter()
    for tokens in sequences:
        step = sequence()
        for token in (None, *tokens):
            before = time.perf_counter()
            taken = step(token)
            after = time.perf_counter()
            if not taken:
                break
            times.steps.append(after - before)
        if after - begin > LIMIT_SECONDS:
            break


def run(vocabulary: Vocabulary, count: int, used: list[int]) -> dict[str, dict[str, Times]]:
    """Times by kind of source and engine. `used` takes the bytes in the mask cache after each."""
    sources = [(p, False) for p in PATTERNS.values()] + [(json.dumps(s), True) for s in SCHEMAS.values()]
    found: dict[str, dict[str, Times]] = {
        kind: {name: Times() for name in ENGINES} for kind in ("regex", "JSON")
    }
    engines = {name: make(vocabulary) for name, make in ENGINES.items()}
    guidance.tokenizer_of(vocabulary)
    for source, is_schema in sources:
        sequences = sequences_of(vocabulary, source, is_schema, count)
        for name, engine in engines.items():
            used.append(masks.num_bytes)
            masks.clear()
            compiled.clear()
            try:
                measure(engine, source, is_schema, sequences, found["JSON" if is_schema else "regex"][name])
            except (ConstraintError, ValueError, RuntimeError, TypeError) as error:
                print(f"  {name} cannot run {source[:50]}: {str(error).splitlines()[0][:80]}")
    return found


def cell(values: list[float]) -> str:
    """p50 / p99 / max in microseconds."""
    if not values:
        return "-"
    return " / ".join(f"{q * 1e6:,.1f}" for q in np.quantile(values, [0.5, 0.99, 1.0]))


def table(results: dict[int, dict[str, dict[str, Times]]]) -> str:
    lines = [
        "| tokens | source | engine | first mask µs, p50 / p99 / max | step, p50 / p99 / max | mean | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, kinds in results.items():
        for kind, by_engine in kinds.items():
            for name, times in by_engine.items():
                mean = f"{np.mean(times.steps) * 1e6:,.1f}" if times.steps else "-"
                row = [
                    f"{size:,}",
                    kind,
                    name,
                    cell(times.first),
                    cell(times.steps),
                    mean,
                    f"{len(times.steps):,}",
                ]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def plot(results: dict[int, dict[str, dict[str, Times]]]) -> str:
    """An SVG of the p99 of a step, one bar for each engine, on a logarithmic scale from 0.1 µs to 1 s."""
    colors = dict(zip(ENGINES, ("#2563eb", "#9ca3af", "#d97706", "#059669"), strict=True))
    bars, y = [], 40
    for size, kinds in results.items():
        for kind, by_engine in kinds.items():
            bars.append(f'<text x="10" y="{y}" font-weight="bold">{size:,} tokens, {kind}</text>')
            for name, times in by_engine.items():
                y += 18
                value = float(np.quantile(times.steps, 0.99)) * 1e6 if times.steps else 0.1
                width = max(1.0, (np.log10(max(value, 0.1)) + 1) * 75)
                bars.append(f'<text x="10" y="{y}">{name}</text>')
                bars.append(
                    f'<rect x="130" y="{y - 11}" width="{width:.0f}" height="13" fill="{colors[name]}"/>'
                )
                bars.append(f'<text x="{135 + width:.0f}" y="{y}">{value:,.1f} µs</text>')
            y += 30
    size = f'width="760" height="{y}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    title = '<text x="10" y="18" font-size="14">Take a token and make the mask: p99, logarithmic</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', title, *bars, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32_768, 49_152, 131_072])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    data = Path(mistral_common.__file__).parent / "data"
    tekken = Vocabulary.from_tokenizer(Tekkenizer.from_file(data / "tekken_240911.json"))
    results, used = {}, [0]
    with TemporaryDirectory() as folder:
        # Indexes of an earlier run would make the first masks of this one too good.
        builder.folder = Path(folder)
        for size in chosen.sizes:
            print(f"{size:,} tokens")
            specials = {i: tekken.token_text(i) for i in range(1000)}
            tokens = [tekken.token_bytes(i) for i in range(size)]
            vocabulary = Vocabulary(tokens, specials=specials, eos_token_ids=[2], bos_token_id=1)
            results[size] = run(vocabulary, chosen.sequences, used)
        builder.wait()
    text = table(results)
    most = max(used)
    memory = f"Mask cache: {most / 2**20:.1f} MiB at most, of {masks.max_bytes / 2**20:.0f} MiB allowed."
    print(text, memory, sep="\n\n")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "constraints.md").write_text(f"{text}\n\n{memory}\n")
    (chosen.out / "constraints.svg").write_text(plot(results))


if __name__ == "__main__":
    main()
