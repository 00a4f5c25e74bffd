"""Random scripts: a program is a list of operations, which a controller runs and a reference reads.

| operation | what it does |
| --- | --- |
| `["fixed", text]` | appends text |
| `["gen", rule, max_tokens, stop_at, store_var, temperature]` | generates; a rule is null or a seed |
| `["token", seed, splices]` | samples one token of a mask; a splice is `[when, backtrack, text]` |
| `["splice", backtrack, text]` | takes tokens back and appends text |
| `["noop"]`, `["stop"]`, `["raise"]` | a round trip, the end, an error |
| `["mark"]`, `["unmark"]` | sets a label, forgets the last one |
| `["back", mark, text]` | replaces what follows a label |
| `["set", name, value]`, `["append", letter]` | a variable, set once in a program; a shared tally |
| `["wait", names]` | waits, then appends the first variable's value |
| `["fork", children]` | the last one; a child is `[decision, program]` |

A decision is null, `["mask", seed]` or `["splice", backtrack, text]`.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

from aici_vllm import aici
from constraints import Constraint
from tests.simulator.model import EOS, LETTERS, TEXT_TOKENS, encode, mix

Program = list[Any]

NAMES = ["v0", "v1", "v2", "v3"]
TALLY = "tally"


def random_program(rng: random.Random) -> Program:
    """A program of up to eight operations, and of up to two forks below each other."""
    return set_once(_random_program(rng, 0))


def _random_program(rng: random.Random, depth: int) -> Program:
    program: Program = []
    marks = 0
    for _ in range(rng.randint(1, 7)):
        kind = rng.choice(_KINDS)
        if kind == "mark":
            marks += 1
        if kind in ("back", "unmark") and not marks:
            continue
        if kind == "fork":
            if depth < 2:
                children = rng.choice([2, 2, 2, 3, 4])
                forked = [[_decision(rng), _random_program(rng, depth + 1)] for _ in range(children)]
                return [*program, ["fork", forked]]
            continue
        program.append(_operation(rng, kind, marks))
    return program


_KINDS = (
    ["fixed"] * 5
    + ["gen"] * 7
    + ["token"] * 2
    + ["mark"] * 3
    + ["back"] * 4
    + ["fork"] * 3
    + ["set"] * 2
    + ["wait", "splice", "noop", "unmark", "append", "stop", "raise"]
)


def _operation(rng: random.Random, kind: str, marks: int) -> list[Any]:
    match kind:
        case "fixed":
            return [kind, _text(rng, rng.choice([0, 1, 3, 8, 8, 30]))]
        case "gen":
            rule = rng.choice([None, rng.randrange(1000), rng.randrange(1000)])
            stop = rng.choice([None, None, None, rng.choice(LETTERS)])
            store = rng.choice([None, None, None, None, rng.choice(NAMES)])
            return [kind, rule, rng.randint(0, 12), stop, store, rng.choice([None, None, None, 0.5])]
        case "token":
            return [kind, rng.randrange(1000), [_splice(rng) for _ in range(rng.choice([0, 0, 1, 2]))]]
        case "splice":
            return [kind, rng.choice([0, 1, 2, 5]), _text(rng, rng.choice([0, 2, 6]))]
        case "back":
            return [kind, rng.randrange(marks), _text(rng, rng.choice([0, 1, 5]))]
        case "set":
            return [kind, rng.choice(NAMES), _text(rng, 4)]
        case "append":
            return [kind, rng.choice(LETTERS)]
        case "wait":
            return [kind, rng.sample(NAMES, rng.choice([1, 1, 2]))]
    return [kind]


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(length))


def _splice(rng: random.Random) -> list[Any]:
    when = rng.sample(TEXT_TOKENS, rng.choice([0, 8, 16]))
    return [when, rng.choice([0, 1, 1, 3]), _text(rng, rng.choice([0, 1, 4]))]


def _decision(rng: random.Random) -> list[Any] | None:
    kind = rng.choice(["none", "none", "none", "mask", "splice"])
    if kind == "mask":
        return [kind, rng.randrange(1000)]
    return None if kind == "none" else [kind, rng.choice([0, 1, 4]), _text(rng, rng.choice([0, 3]))]


def set_once(program: Program) -> Program:
    """The program without operations that set a variable again: which branch is first is not its to say."""
    return _set_once(program, set())


def _set_once(program: Program, known: set[str]) -> Program:
    made: Program = []
    for operation in program:
        match operation:
            case ["set", name, _]:
                if name not in known:
                    known.add(name)
                    made.append(operation)
            case ["gen", rule, count, stop, store, temperature]:
                made.append(["gen", rule, count, stop, None if store in known else store, temperature])
                known.add(store)
            case ["fork", children]:
                made.append(["fork", [[decision, _set_once(child, known)] for decision, child in children]])
            case _:
                made.append(operation)
    return made


def takes_back_unmarked(program: Program) -> bool:
    """Whether some operation may take back tokens that no label guards, and that the client has by then."""
    for operation in program:
        match operation:
            case ["splice", backtrack, _] if backtrack:
                return True
            case ["token", _, splices] if any(backtrack > 1 for _, backtrack, _ in splices):
                return True
            case ["fork", children]:
                decisions = [decision for decision, _ in children if decision is not None]
                if takes_back_unmarked(decisions) or any(takes_back_unmarked(child) for _, child in children):
                    return True
    return False


# What a rule or a mask allows, said once for the controller and the reference: it is part of the question.


def mask_of(seed: int) -> list[int]:
    """The tokens of a mask, ascending; never none."""
    allowed = [token for token in [*TEXT_TOKENS, EOS] if mix(seed, token) % 3 == 0]
    return allowed or [EOS]


class Rule:
    """What may follow `tokens` under the rule `seed`."""

    def __init__(self, seed: int, tokens: list[int]) -> None:
        number, forced = seed, list[int]()
        for token in tokens:
            number, forced = mix(number, token), forced[1:]
            if not forced and number % 7 == 0:
                forced = encode(LETTERS[number % 16] * (1 + number % 4) + LETTERS[number % 13])
        self.forced = forced
        self.must_end = not forced and number % 11 == 0 and len(tokens) > 1
        self.may_end = not forced and (self.must_end or number % 5 == 0)
        self.allowed = forced[:1]
        # One state in 29 is a dead end: nothing may follow, and the text may not end.
        if not forced and not self.must_end and number % 29:
            self.allowed = [token for token in TEXT_TOKENS if mix(number, token) % 4 == 0]


class Walk(Constraint):
    """Text that obeys a `Rule` at every token. Half of the rules have names for their masks."""

    def __init__(self, seed: int, tokens: list[int] | None = None) -> None:
        super().__init__()
        self._seed = seed
        self._tokens = list(tokens or [])
        self._rule = Rule(seed, self._tokens)

    def eos_allowed(self) -> bool:
        return self._rule.may_end

    def eos_forced(self) -> bool:
        return self._rule.must_end

    def token_allowed(self, token: int) -> bool:
        return self._rule.may_end if token == EOS else token in self._rule.allowed

    def append_token(self, token: int) -> None:
        super().append_token(token)
        self._tokens.append(token)
        self._rule = Rule(self._seed, self._tokens)

    def forced_tokens(self) -> list[int]:
        return self._rule.forced

    def state_key(self) -> Hashable | None:
        return ("walk", self._seed, tuple(self._tokens)) if self._seed % 2 else None

    def fork(self) -> Walk:
        copy = Walk(self._seed, self._tokens)
        copy.vocabulary = self.vocabulary
        return copy


# The controller.


async def controller(program: Program) -> None:
    """Run a program. Each branch prints its path from the root when it knows it."""
    print("@0")
    await _run(program, "0", [])


async def _run(program: Program, path: str, marks: list[aici.Label | None]) -> None:
    for operation in program:
        match operation:
            case ["fork", children]:
                index = await aici.fork([_branch(decision) for decision, _ in children])
                print(f"@{path}.{index}")
                await _run(children[index][1], f"{path}.{index}", marks)
            case ["mark"]:
                marks.append(aici.Label())
            case ["unmark"]:
                _unmark(marks)
            case ["back", index, text]:
                await _back(marks[index] if index < len(marks) else None, text)
            case ["set", name, value]:
                aici.set_var(name, value)
            case ["append", letter]:
                aici.append_var(TALLY, letter)
            case ["wait", names]:
                values = await aici.wait_vars(*names)
                await aici.FixedTokens(values[0])
            case ["raise"]:
                raise RuntimeError("the script raises")
            case _:
                await _awaited(operation)


def _unmark(marks: list[aici.Label | None]) -> None:
    live = [index for index, mark in enumerate(marks) if mark is not None]
    if live:
        marks[live[-1]] = None


async def _back(mark: aici.Label | None, text: str) -> None:
    if mark is None:
        return
    try:
        fixed = aici.FixedTokens(text, following=mark)
    except ValueError:
        return
    await fixed


async def _awaited(operation: list[Any]) -> None:
    match operation:
        case ["fixed", text]:
            await aici.FixedTokens(text)
        case ["gen", rule, max_tokens, stop, store, temperature]:
            await aici.gen_tokens(
                constraint=None if rule is None else Walk(rule),
                max_tokens=max_tokens,
                stop_at=stop,
                store_var=store,
                temperature=temperature,
            )
        case ["token", seed, splices]:
            made = [aici.Splice(when_sampled=w, backtrack=b, ff_tokens=encode(t)) for w, b, t in splices]
            await _Decided(aici.Branch(sample_mask=_mask(seed), splices=made))
        case ["splice", backtrack, text]:
            await _Decided(_branch(["splice", backtrack, text]))
        case ["noop"]:
            await aici.Noop()
        case ["stop"]:
            await aici.StopToken()


class _Decided(aici.NextToken):
    def __init__(self, branch: aici.Branch) -> None:
        self._branch = branch

    def mid_process(self) -> aici.MidProcessResult:
        return aici.MidProcessResult([self._branch])


def _branch(decision: list[Any] | None) -> aici.Branch:
    match decision:
        case ["mask", seed]:
            return aici.Branch(sample_mask=_mask(seed))
        case ["splice", backtrack, text]:
            return aici.Branch(splices=[aici.Splice(backtrack=backtrack, ff_tokens=encode(text))])
    return aici.Branch.noop()


def _mask(seed: int) -> aici.TokenSet:
    mask = aici.TokenSet()
    for token in mask_of(seed):
        mask[token] = True
    return mask
