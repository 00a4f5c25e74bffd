"""Random controllers: a program is a list of operations that any engine can be asked to check."""

import json
import random
from typing import Any

from aici_vllm import aici

TEXTS = [" The capital of France is", "\nOnce", " 12 +", ". Then", " é日本語", "\n\n-", " she said", ":"]
REGEXES = [
    r' "[^"\n]+"',
    r"[0-9]{1,4}",
    r" (yes|no|maybe)",
    r"(ab|abc|b)+c",
    r" [A-Z][a-z]*\.",
    r"[a-z ]{3,12}",
]
OPTIONS = [[" red", " green", " blue"], ["a", "ab", "abc"], [" one way", " one day", " two"]]


def random_program(rng: random.Random, depth: int = 0) -> list[Any]:
    """Fixed text, generation, backtracking and forks in random order."""
    program: list[Any] = []
    marks = 0
    for _ in range(rng.randint(3, 6)):
        kind = rng.choice(["fixed", "gen", "gen", "gen", "mark", "back", "fork"])
        if kind == "fixed":
            program.append(["fixed", rng.choice(TEXTS) * rng.choice([1, 1, 1, 30])])
        elif kind == "gen":
            program.append(["gen", *_constraint(rng), rng.randint(1, 8)])
        elif kind == "mark":
            program.append(["mark"])
            marks += 1
        elif kind == "back" and marks:
            program.append(["back", rng.randrange(marks), rng.choice([*TEXTS, ""])])
        elif kind == "fork" and depth < 2:
            branches = [random_program(rng, depth + 1) for _ in range(rng.randint(1, 3))]
            return [*program, ["fork", branches]]
    return program


def _constraint(rng: random.Random) -> tuple[str, Any]:
    return rng.choice([("any", None), ("regex", rng.choice(REGEXES)), ("options", rng.choice(OPTIONS))])


async def controller(arg: str) -> None:
    """Run a random program; every branch prints where its generations stand: [start, count, kind, value]."""
    await aici.FixedTokens("")
    generations: list[Any] = []
    await _run(json.loads(arg), [], generations)
    print("@" + json.dumps(generations))


async def _run(program: list[Any], marks: list[aici.Label], generations: list[Any]) -> None:
    for operation, *rest in program:
        if operation == "fixed":
            await aici.FixedTokens(rest[0])
        elif operation == "gen":
            kind, value, max_tokens = rest
            start = len(aici.get_tokens())
            given = {} if kind == "any" else {kind: value}
            tokens = await aici.gen_tokens(**given, max_tokens=max_tokens)
            generations.append([start, len(tokens), kind, value])
        elif operation == "mark":
            marks.append(aici.Label())
        elif operation == "back":
            mark, text = rest
            try:
                await aici.FixedTokens(text, following=marks[mark])
            except ValueError:
                print("label gone")
            else:
                generations[:] = [g for g in generations if g[0] + g[1] <= marks[mark].ptr]
        elif operation == "fork":
            index = await aici.fork(len(rest[0]))
            await _run(rest[0][index], marks, generations)
