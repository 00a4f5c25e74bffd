"""What each word of a script does to its branch, for native and sandboxed programs alike.

`aici_vllm.aici` gives these words their script syntax in plain Python; the sandbox gives them theirs.
Bad arguments raise here, so the error stands at the line of the script that made it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import constraints
from aici_vllm.controller.awaits import Decide, FixedText, Generate, WaitVars
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.decisions import BranchDecision, MidProcessResult
from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.sampling import Generation
from constraints import Constraint, Vocabulary

MOST_NAMES = 256
"""Variables that one `wait_vars` may name: whoever waits looks for all of them again and again."""


def fixed_text(branch: Branch, text: str | bytes, following: int | None = None) -> FixedText:
    """Append `text`, after taking back everything since the mark `following`.

    Raises:
        TypeError: `text` is neither str nor bytes.
        ValueError: the mark is gone, or the text is longer than any that the model's context holds.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"FixedTokens takes str or bytes, not {type(text).__name__}")
    context = branch.group.context
    if len(text) > context * branch.group.vocabulary.longest_text:
        raise ValueError(
            f"the tokens of fixed text do not fit: {len(text)} characters are more than {context} tokens, "
            "which the model's context holds, can spell"
        )
    if following is not None:
        branch.sequence.position(following)
    if branch.log_level >= 1:
        branch.log.write(f"FIXED {text!r}\n")
    return FixedText(branch.group.vocabulary.tokenize(text), following)


def generate(
    branch: Branch,
    *,
    regex: str | None = None,
    yacc: str | None = None,
    substring: str | None = None,
    substring_end: str = '"',
    options: Sequence[str] | None = None,
    grammar: str | None = None,
    json_schema: Any = None,
    constraint: Constraint | None = None,
    store_var: str | None = None,
    stop_at: str | None = None,
    max_tokens: int = 20,
    min_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Generate:
    """Sample tokens under at most one constraint.

    Raises:
        TypeError, ValueError: two constraints, a number out of range, something of another type, or a
            constraint that does not compile.
    """
    sources: dict[str, Callable[[Vocabulary], Constraint] | None] = {
        "regex": regex if regex is None else lambda v: constraints.regex(v, regex),
        "yacc": yacc if yacc is None else lambda v: constraints.yacc(v, yacc),
        "substring": substring
        if substring is None
        else lambda v: constraints.substring(v, substring, substring_end),
        "options": options if options is None else lambda v: constraints.options(v, options),
        "grammar": grammar if grammar is None else lambda v: constraints.lark(v, grammar),
        "json_schema": json_schema
        if json_schema is None
        else lambda v: constraints.json_schema(v, json_schema),
        "constraint": constraint if constraint is None else lambda v: constraint,
    }
    given = {name: make for name, make in sources.items() if make is not None}
    if len(given) > 1:
        raise ValueError(f"at most one constraint may be given, not {' and '.join(given)}")
    _check_numbers(branch, max_tokens, min_tokens, temperature, top_p)
    if not isinstance(stop_at, (str, type(None))):
        raise TypeError(f"stop_at must be a string, not {type(stop_at).__name__}")
    vocabulary = branch.group.vocabulary
    if constraint is not None:
        if not isinstance(constraint, Constraint):
            raise TypeError(f"constraint must be a Constraint, not {type(constraint).__name__}")
        constraint.vocabulary = constraint.vocabulary or vocabulary
    make = next(iter(given.values()), constraints.AnyText)
    return Generate(
        make(vocabulary),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_at=stop_at.encode() if stop_at else None,
        store_var=None if store_var is None else _check_name(store_var),
        temperature=temperature,
        top_p=top_p,
        shared=constraint is not None,
    )


def prepare(branch: Branch, request: Generate) -> None:
    """Have the constraint find out what the engine is going to ask it first.

    Constraints remember what they found, for all sequences: whoever may take its time does this, and the
    engine, which must not, only looks it up. Of no use for a user's own constraint.
    """
    if request.constraint.has_choice():
        request.constraint.mask_row()
        return
    twin = replace(request, constraint=request.constraint.fork())
    generation = Generation(twin, branch.group.vocabulary)
    generation.take_forced()
    if not generation.finished:
        generation.mask_row()


def _check_numbers(
    branch: Branch, max_tokens: int, min_tokens: int, temperature: float | None, top_p: float | None
) -> None:
    if not isinstance(max_tokens, int) or max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, not {max_tokens!r}")
    if max_tokens > branch.group.context:
        raise ValueError(
            f"max_tokens={max_tokens} is more than the model's context of {branch.group.context} tokens"
        )
    if not isinstance(min_tokens, int) or not 0 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens must be from 0 to max_tokens, not {min_tokens!r}")
    if temperature is not None and not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature must be 0 or more, not {temperature!r}")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be over 0 and at most 1, not {top_p!r}")


def fork(branch: Branch, branches: int | list[BranchDecision]) -> Decide:
    """Become several branches: a number of equal ones, or one per decision.

    Raises:
        LimitError: more branches than a request may ever make, or a splice that cannot fit.
        TypeError: neither a number nor a list.
        ValueError: fewer than one branch.
    """
    if isinstance(branches, int):
        check_count(branch, branches)
        branches = [BranchDecision.noop() for _ in range(branches)]
    if not branches:
        raise ValueError("fork() needs at least 1 branch")
    return decide(branch, branches)


def decide(branch: Branch, branches: list[BranchDecision]) -> Decide:
    """Go on as `branches` say: none stops, one goes on, more fork.

    Raises:
        LimitError: more branches than a request may ever make, or a splice that cannot fit.
        TypeError: not a list of branches.
    """
    if isinstance(branches, list):
        check_count(branch, len(branches))
    result = MidProcessResult(branches)
    for decision in branches:
        check_splices(branch, [(splice.when_sampled, splice.ff_tokens) for splice in decision.splices])
    return Decide(result)


def check_count(branch: Branch, count: int) -> None:
    """Refuse more branches than a request may ever make, with a LimitError."""
    most = branch.group.limits.branches_made
    if count > most:
        raise LimitError(f"too many forks (a request may make {most} branches in all)")


def check_splices(branch: Branch, splices: Iterable[tuple[list[int], list[int]]]) -> None:
    """Refuse a branch's (`when_sampled`, `ff_tokens`) that cannot all be of use, with a LimitError."""
    context, size = branch.group.context, branch.group.vocabulary.size
    named = 0
    for when_sampled, ff_tokens in splices:
        if len(ff_tokens) > context:
            raise LimitError(f"a splice of {len(ff_tokens)} tokens does not fit: the context holds {context}")
        named += max(len(when_sampled), 1)
    if named > size:
        raise LimitError(f"the splices of a branch name {named} tokens, and the vocabulary has {size}")


def wait_vars(branch: Branch, names: Sequence[str]) -> WaitVars:
    """Sleep until all `names` are set. A name that is given again is waited for once.

    Raises:
        LimitError: too many names.
        TypeError: a name is no string.
    """
    if len(names) > MOST_NAMES:
        raise LimitError(f"wait_vars() takes {MOST_NAMES} names at most, not {len(names)}")
    return WaitVars(tuple(dict.fromkeys(map(_check_name, names))))


def in_order(names: Sequence[str], waited: WaitVars, values: list[bytes]) -> list[bytes]:
    """The values that `waited` gave, one for each of the `names` it was made of."""
    by_name = dict(zip(waited.names, values, strict=True))
    return [by_name[name] for name in names]


def get_var(branch: Branch, name: str) -> bytes | None:
    """The value of a variable; None when it is not set."""
    return branch.group.variables.get(_check_name(name))


def set_var(branch: Branch, name: str, value: str | bytes) -> None:
    """Set a variable for all branches of the request."""
    branch.group.variables.set(_check_name(name), _to_bytes(value), branch.index)


def append_var(branch: Branch, name: str, value: str | bytes) -> None:
    """Add to the end of a variable; a missing one starts empty."""
    branch.group.variables.append(_check_name(name), _to_bytes(value), branch.index)


def check_var(branch: Branch, name: str, expected: str | bytes) -> None:
    """Raise AssertionError unless the variable holds the bytes of `expected`."""
    found = get_var(branch, name)
    if found is None:
        raise AssertionError(f"Variable {name} is unset")
    if found != _to_bytes(expected):
        raise AssertionError(f"Variable {name}: {found.decode(errors='replace')!r} != {expected!r}")


def check_vars(branch: Branch, expected: dict[str, str]) -> None:
    """`check_var` for each."""
    if not isinstance(expected, dict):
        raise TypeError(f"check_vars() takes a dict, not {type(expected).__name__}")
    for name, value in expected.items():
        check_var(branch, name, value)


def get_config(name: str) -> int:
    """1 for what this host can do ("fork", "backtrack", "ff_tokens"), 0 for anything else."""
    return int(name in ("fork", "backtrack", "ff_tokens"))


def get_tokens(branch: Branch) -> list[int]:
    """All tokens so far, the prompt too."""
    return list(branch.sequence.tokens)


def position(branch: Branch, mark: int) -> int:
    """How many tokens stand before `mark`.

    Raises:
        ValueError: the mark is gone.
    """
    return branch.sequence.position(mark)


def tokens_since(branch: Branch, mark: int) -> list[int]:
    """The tokens after `mark`.

    Raises:
        ValueError: the mark is gone.
    """
    return branch.sequence.tokens[branch.sequence.position(mark) :]


def text_since(branch: Branch, mark: int) -> str:
    """The text after `mark`; bytes that are no UTF-8 become U+FFFD."""
    return branch.group.vocabulary.detokenize(tokens_since(branch, mark)).decode(errors="replace")


def _check_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a variable's name must be a string, not {type(name).__name__}")
    name.encode()  # A surrogate could not be sent to the client.
    return name


def _to_bytes(value: str | bytes) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise TypeError(f"a variable holds str or bytes, not {type(value).__name__}")
