"""What a program must come to: read one operation at a time, without an engine.

Shares the model, the tokenizer and the rules of masks with the simulator, and no code with the project.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from tests.simulator.model import EOS, PLAIN_TOKENS, Prefix, encode, next_token, text_of
from tests.simulator.scripts import TALLY, Program, Rule, mask_of


@dataclass
class Outcome:
    """How one branch ended: its tokens after the prompt, and why. The path is None if it never learned it."""

    path: str | None
    tokens: list[int]
    reason: str

    def key(self) -> tuple[str, list[int], str]:
        return (self.path or "", self.tokens, self.reason)


@dataclass
class Expected:
    """Everything a request must come to. The tally is sorted: branches add to it in any order."""

    outcomes: list[Outcome] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    sampled: int = 0
    spliced: int = 0


class Ended(Exception):
    """A branch has ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def run_plain(root: Prefix, prompt: list[int], max_tokens: int, context: int) -> list[int]:
    """What a request without a controller generates."""
    prefix, made = root.then_all(prompt), list[int]()
    while len(made) < max_tokens and prefix.length < context and EOS not in made:
        made.append(next_token(prefix, PLAIN_TOKENS))
        prefix = prefix.then(made[-1])
    return made


def run_program(root: Prefix, program: Program, prompt: list[int], max_tokens: int, context: int) -> Expected:
    """What a request with a controller comes to."""
    run = _Run(root, max_tokens, context)
    run.start(_Branch(list(prompt), len(prompt), "0"), program)
    run.finish()
    return run.expected


@dataclass
class _Branch:
    tokens: list[int]
    prompt_len: int
    path: str | None
    awaited: bool = False
    marks: list[int | None] = field(default_factory=list)
    """Positions; None for a mark that is gone."""
    forgotten: set[int] = field(default_factory=set)

    def copy(self, path: str | None) -> _Branch:
        marks, forgotten = list(self.marks), set(self.forgotten)
        return _Branch(list(self.tokens), self.prompt_len, path, self.awaited, marks, forgotten)


Steps = Generator[list[str], None, None]
"""A branch that runs; it yields the names that it waits for."""


class _Run:
    def __init__(self, root: Prefix, max_tokens: int, context: int) -> None:
        self.expected = Expected()
        self._root, self._max_tokens, self._context = root, max_tokens, context
        self._waiting: list[tuple[_Branch, Steps, list[str]]] = []

    def start(
        self, branch: _Branch, program: Program, decision: Any = None, forked: str | None = None
    ) -> None:
        self._go_on(branch, self._steps(branch, program, decision, forked))

    def finish(self) -> None:
        """Go on with who waits for what is there; whoever is left waits for ever."""
        variables = self.expected.variables
        while ready := [w for w in self._waiting if all(name in variables for name in w[2])]:
            for entry in ready:
                self._waiting.remove(entry)
                self._go_on(entry[0], entry[1])
        for branch, _, _ in self._waiting:
            self._end(branch, "deadlock")

    def _go_on(self, branch: _Branch, steps: Steps) -> None:
        try:
            self._waiting.append((branch, steps, next(steps)))
        except StopIteration:
            self._end(branch, "stop")
        except Ended as ended:
            self._end(branch, ended.reason)

    def _end(self, branch: _Branch, reason: str) -> None:
        self.expected.outcomes.append(Outcome(branch.path, branch.tokens[branch.prompt_len :], reason))

    def _steps(self, branch: _Branch, program: Program, decision: Any, forked: str | None) -> Steps:
        if forked is not None:
            self._decide(branch, decision)
            branch.path = forked
        for operation in program:
            match operation:
                case ["wait", names]:
                    branch.awaited = True
                    if not all(name in self.expected.variables for name in names):
                        yield names
                    self._splice(branch, len(branch.tokens), self.expected.variables[names[0]])
                case ["fork", children]:
                    branch.awaited = True
                    first, *others = children
                    for index, (chosen, child) in enumerate(others, start=1):
                        copy = branch.copy(None)
                        self.start(copy, child, chosen, f"{branch.path}.{index}")
                    yield from self._steps(branch, first[1], first[0], f"{branch.path}.0")
                    return
                case _:
                    self._do(branch, operation)

    def _do(self, branch: _Branch, operation: list[Any]) -> None:
        match operation:
            case ["mark"]:
                branch.marks.append(len(branch.tokens) if branch.awaited else 0)
            case ["unmark"]:
                live = [index for index in range(len(branch.marks)) if index not in branch.forgotten]
                branch.forgotten.update(live[-1:])
            case ["back", index, text]:
                position = branch.marks[index] if index < len(branch.marks) else None
                if index not in branch.forgotten and position is not None:
                    branch.awaited = True
                    self._splice(branch, position, text)
            case ["set", name, value]:
                self.expected.variables[name] = value
            case ["append", letter]:
                tally = self.expected.variables.get(TALLY, "") + letter
                self.expected.variables[TALLY] = "".join(sorted(tally))
            case ["raise"]:
                raise Ended("fail")
            case _:
                branch.awaited = True
                self._await(branch, operation)

    def _await(self, branch: _Branch, operation: list[Any]) -> None:
        match operation:
            case ["fixed", text]:
                self._splice(branch, len(branch.tokens), text)
            case ["gen", rule, max_tokens, stop, store, _]:
                self._generate(branch, rule, max_tokens, stop, store)
            case ["token", seed, splices]:
                self._masked(branch, seed, splices)
            case ["splice", _, _]:
                self._decide(branch, operation)
            case ["stop"]:
                raise Ended("stop")

    def _decide(self, branch: _Branch, decision: Any) -> None:
        match decision:
            case ["mask", seed]:
                self._masked(branch, seed, [])
            case ["splice", backtrack, text]:
                self._splice(branch, len(branch.tokens) - backtrack, text)

    def _masked(self, branch: _Branch, seed: int, splices: list[Any]) -> None:
        token = self._sample(branch, mask_of(seed))
        for when, backtrack, text in splices:
            if not when or token in when:
                self._splice(branch, len(branch.tokens) - backtrack, text)
                return

    def _generate(self, branch: _Branch, rule: int | None, count: int, stop: Any, store: Any) -> None:
        made: list[int] = []
        finished = count <= 0 or (rule is not None and Rule(rule, []).must_end)
        while not finished:
            step = None if rule is None else Rule(rule, made)
            if step is not None and step.forced:
                # What is forced may be cut short by whatever ends the generation.
                token = step.forced[0]
                self._splice_tokens(branch, len(branch.tokens), [token])
            elif step is None:
                token = self._sample(branch, PLAIN_TOKENS)
            else:
                allowed = step.allowed + ([EOS] if step.may_end else [])
                token = self._sample(branch, allowed or [EOS])
            made.append(token)
            finished = token == EOS or len(made) >= count
            if not finished:
                finished = bool(stop and stop in text_of(made))
                finished = finished or (rule is not None and Rule(rule, made).must_end)
        if store is not None:
            self.expected.variables[store] = text_of(made)

    def _sample(self, branch: _Branch, allowed: list[int]) -> int:
        if not branch.tokens:
            raise Ended("fail")
        used = len(branch.tokens) - branch.prompt_len
        if used >= self._max_tokens or len(branch.tokens) >= self._context:
            raise Ended("length")
        token = next_token(self._root.then_all(branch.tokens), allowed)
        branch.tokens.append(token)
        self.expected.sampled += 1
        return token

    def _splice(self, branch: _Branch, position: int, text: str) -> None:
        room = self._max_tokens - (position - min(branch.prompt_len, position))
        if position < 0 or position + len(encode(text)[:room]) > self._context:
            raise Ended("fail")
        self._splice_tokens(branch, position, encode(text))

    def _splice_tokens(self, branch: _Branch, position: int, tokens: list[int]) -> None:
        if position < len(branch.tokens):
            del branch.tokens[position:]
            branch.prompt_len = min(branch.prompt_len, position)
            branch.marks = [None if m is None or m > position else m for m in branch.marks]
        room = self._max_tokens - (position - branch.prompt_len)
        taken = tokens[: min(room, self._context - position)]
        branch.tokens += taken
        self.expected.spliced += len(taken)
        if len(taken) < len(tokens):
            raise Ended("length")
