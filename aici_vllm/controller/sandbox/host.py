"""What a sandboxed script can ask: one function for each word, run in this process.

Whatever comes in was made by the script, so everything is checked here or in `words`.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydantic_monty

import constraints
from aici_vllm.controller import awaits, words
from aici_vllm.controller.awaits import Awaitable, Decide, Decided, Generate
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.decisions import BranchDecision, MidProcessResult, Splice
from aici_vllm.controller.errors import LimitError
from aici_vllm.controller.sandbox.faults import long_limit
from constraints import Constraint, TokenSet, Vocabulary

UNTIMED = frozenset(["FixedTokens", "gen_tokens", "gen_text", "new_constraint", "new_lexer"])
"""Words that may take long once, for a long text or a large grammar: a turn has time of its own for them."""

MOST_CONSTRAINTS = 256
"""Constraints that one script may hold."""

MOST_LABELS = 1024
"""Labels of one script whose text stands. The sandbox does not tell when a script forgets one."""

LARGEST_ARGUMENT = 1 << 20
"""Characters, bytes and items that one call may hand over, all its arguments together."""

PIECE = 1 << 12
"""Tokens that are turned into text at once, while no other thread runs."""

MOST_SHOWN = 1 << 16
"""Tokens that `tokens_repr` takes."""


class OutOfTime(Exception):
    """What the turn has asked for took too long: it ends, whatever the script would do about it."""


@dataclass(slots=True)
class Pending:
    """The answer of an awaited word: what the branch must do, and how its result looks to the script.

    `convert` may raise a ValueError, which the script then sees at its await.
    """

    awaitable: Awaitable
    convert: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Main:
    """What a script gave to `aici.start`: the kind of it, and what the log says when it is over."""

    kind: str
    ending: str


def _same(value: Any) -> Any:
    return value


class Host:
    """The side of a branch that its script can reach."""

    def __init__(self, branch: Branch):
        self.branch = branch
        self.seconds = 0.0
        """CPU time that the turn's questions have taken here, those that may take long aside."""
        self.long_seconds = 0.0
        """CPU time that those have taken."""
        self.constraints: dict[int, Constraint] = {}
        self.lexers: dict[int, constraints.DynamicLexer] = {}
        """Lexers under the number of their only constraint."""
        self.main: Main | None = None
        """What the script has given to `aici.start`, if it has."""

    @property
    def vocabulary(self) -> Vocabulary:
        return self.branch.group.vocabulary

    def begin_turn(self) -> None:
        """Nothing was asked yet."""
        self.seconds = self.long_seconds = 0.0

    def fork(self, branch: Branch) -> "Host":
        """The same for a copy of the script that goes on as `branch`."""
        copy = Host(branch)
        copy.main = self.main
        copy.constraints = {handle: constraint.fork() for handle, constraint in self.constraints.items()}
        # A copy that adds an identifier adds it for itself alone, as AICI's own processes did.
        copy.lexers = {handle: lexer.fork() for handle, lexer in self.lexers.items()}
        copy.constraints.update({handle: lexer.constraint() for handle, lexer in copy.lexers.items()})
        return copy

    def take_over(self, request: Generate, host: "Host") -> Generate:
        """A generation that `host`, of which this is a copy, was asked for and has not begun."""
        held = (handle for handle, constraint in host.constraints.items() if constraint is request.constraint)
        handle = next(held, None)
        constraint = request.constraint.fork() if handle is None else self.constraints[handle]
        return replace(request, constraint=constraint)

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Answer the word `name`: a value, or a `Pending` for one that is awaited.

        Raises:
            OutOfTime: the turn has asked for too much.
            Exception: whatever the script should see raised at its line.
        """
        limits = self.branch.group.limits
        if name in UNTIMED and self.long_seconds > limits.init_seconds:
            raise OutOfTime(f"TimeoutError: {long_limit(limits)}")
        log_level, *given = args
        word = WORDS[name]
        # The lane's own time: on a busy machine, others' is in the wall's.
        started = time.thread_time()
        try:
            _check_size([given, kwargs])
            if isinstance(log_level, int):
                self.branch.log_level = log_level
            answer = word.function(self, *given, **kwargs)
        except TypeError:
            # Perhaps the arguments do not fit; asking before each call would take longer than most answers.
            _check_arguments(name, word, self, given, kwargs)
            raise
        finally:
            seconds = time.thread_time() - started
            if name in UNTIMED:
                self.long_seconds += seconds
            else:
                self.seconds += seconds
        return answer


Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Word:
    """One word: what answers it, and whether the script awaits the answer."""

    function: Function
    signature: inspect.Signature
    awaited: bool


WORDS: dict[str, Word] = {}
"""Every word that the preludes ask for, by its name in a script."""


def _word(function: Function) -> Function:
    signature = inspect.signature(function, eval_str=True)
    WORDS[function.__name__] = Word(function, signature, signature.return_annotation is Pending)
    return function


def _check_arguments(name: str, word: Word, host: Host, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    try:
        word.signature.bind(host, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None


def _check_size(value: Any, what: str = "arguments") -> None:
    size = _size(value)
    if size > LARGEST_ARGUMENT:
        raise ValueError(f"the {what} of one call may hold {LARGEST_ARGUMENT} characters, not {size}")


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return len(value) + sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) + sum(map(_size, value))
    return 0


def _attribute(thing: Any, name: str) -> Any:
    """What an object of the sandbox holds; it crosses as a picture of itself."""
    return thing.attributes.get(name) if isinstance(thing, pydantic_monty.MontyClassProxy) else None


def _mark(label: Any) -> int:
    mark = _attribute(label, "mark")
    if not isinstance(mark, int):
        raise TypeError(f"following= takes a Label, not {type(label).__name__}")
    return mark


def _ids(tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise TypeError("expected a list of token ids")
    return tokens


@_word
def begin_main(host: Host, kind: str, ending: str) -> None:
    if kind not in ("coroutine", "function"):
        raise TypeError(f"aici.start() takes an async function or its coroutine, not {kind}")
    if host.main is not None:
        raise RuntimeError("aici.start() can be called once only")
    host.main = Main(kind, str(ending))


# Text, tokens and variables.


@_word
def tokenize(host: Host, text: str | bytes) -> list[int]:
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"tokenize() takes str or bytes, not {type(text).__name__}")
    return host.vocabulary.tokenize(text)


@_word
def detokenize(host: Host, tokens: list[int]) -> bytes:
    return _text(host, _ids(tokens))


def _text(host: Host, tokens: list[int]) -> bytes:
    """As `detokenize`, bounded, and never held up by one piece of it for long."""
    text = bytearray()
    for start in range(0, len(tokens), PIECE):
        text += host.vocabulary.detokenize(tokens[start : start + PIECE])
        if len(text) > LARGEST_ARGUMENT:
            raise ValueError(f"the text of {len(tokens)} tokens is longer than {LARGEST_ARGUMENT} bytes")
    return bytes(text)


@_word
def token_repr(host: Host, token: int) -> str:
    return host.vocabulary.token_repr(_ids([token])[0])


@_word
def tokens_repr(host: Host, tokens: list[int]) -> str:
    if len(_ids(tokens)) > MOST_SHOWN:
        raise ValueError(f"tokens_repr() takes {MOST_SHOWN} tokens at most, not {len(tokens)}")
    return host.vocabulary.tokens_repr(tokens)


@_word
def eos_token(host: Host) -> int:
    return host.vocabulary.eos_token_id


@_word
def get_var(host: Host, name: str) -> bytes | None:
    return words.get_var(host.branch, name)


@_word
def set_var(host: Host, name: str, value: str | bytes) -> None:
    words.set_var(host.branch, name, value)


@_word
def append_var(host: Host, name: str, value: str | bytes) -> None:
    words.append_var(host.branch, name, value)


@_word
def check_var(host: Host, name: str, value: str) -> None:
    words.check_var(host.branch, name, value)


@_word
def check_vars(host: Host, variables: dict[str, str]) -> None:
    words.check_vars(host.branch, variables)


@_word
def get_tokens(host: Host) -> list[int]:
    return words.get_tokens(host.branch)


@_word
def get_prompt_len(host: Host) -> int:
    return host.branch.initial_prompt_len


@_word
def controller_arg(host: Host) -> str:
    return host.branch.group.arg


@_word
def fork_supported(host: Host) -> bool:
    return True


@_word
def backtrack_supported(host: Host) -> bool:
    return True


@_word
def get_config(host: Host, name: str) -> int:
    return words.get_config(name)


@_word
def Label(host: Host) -> tuple[int, int]:
    if len(host.branch.sequence.marks) >= MOST_LABELS:
        raise LimitError(
            f"a script may hold {MOST_LABELS} labels: make them where text may be taken back only"
        )
    mark = host.branch.mark()
    return mark, host.branch.sequence.position(mark)


@_word
def tokens_since(host: Host, mark: int) -> list[int]:
    return words.tokens_since(host.branch, mark)


@_word
def text_since(host: Host, mark: int) -> str:
    return words.text_since(host.branch, mark)


# Token sets and constraints.


def _set(host: Host, bits: Any) -> TokenSet:
    """The token set that a script's packed bits stand for."""
    vocabulary = host.vocabulary
    if not isinstance(bits, bytes) or len(bits) != 4 * vocabulary.num_words:
        raise TypeError("expected a TokenSet of this model")
    return TokenSet(vocabulary.size, vocabulary, np.frombuffer(bits, np.int32).copy())


@_word
def empty_set(host: Host) -> tuple[int, bytes]:
    return host.vocabulary.size, bytes(4 * host.vocabulary.num_words)


@_word
def full_set(host: Host) -> tuple[int, bytes]:
    return host.vocabulary.size, host.vocabulary.all_tokens().row.tobytes()


@_word
def new_constraint(host: Host, kind: str, *args: Any) -> int:
    handle = _new_handle(host)
    host.constraints[handle] = _make_constraint(host.vocabulary, kind, *args)
    return handle


def _new_handle(host: Host) -> int:
    if len(host.constraints) >= MOST_CONSTRAINTS:
        raise ValueError(f"a script may make {MOST_CONSTRAINTS} constraints")
    return len(host.constraints)


def _make_constraint(vocabulary: Vocabulary, kind: str, *args: Any) -> Constraint:
    match kind, args:
        case "any text", ():
            return constraints.AnyText(vocabulary)
        case "regex", (str() as pattern,):
            return constraints.regex(vocabulary, pattern)
        case "yacc", (str() as grammar,):
            return constraints.yacc(vocabulary, grammar)
        case "lark", (str() as grammar,):
            return constraints.lark(vocabulary, grammar)
        case "substring", (str() as template, str() as stop_at):
            return constraints.substring(vocabulary, template, stop_at)
        case "options", (list() as options,):
            return constraints.options(vocabulary, options)
    raise TypeError(f"a constraint of kind {kind} cannot be made of {args!r}")


def _constraint(host: Host, handle: Any) -> Constraint:
    if not isinstance(handle, int) or handle not in host.constraints:
        raise TypeError("expected a constraint made by aici.RegexConstraint or its likes")
    return host.constraints[handle]


@_word
def ask_constraint(host: Host, handle: int, question: str, token: int = 0) -> Any:
    constraint = _constraint(host, handle)
    token = _ids([token])[0]
    match question:
        case "eos_allowed":
            return constraint.eos_allowed()
        case "eos_forced":
            return constraint.eos_forced()
        case "token_allowed":
            return constraint.token_allowed(token)
        case "append_token":
            return constraint.append_token(token)
        case "allow_tokens":
            return constraint.mask_row().tobytes()
    raise ValueError(f"constraints do not answer {question!r}")


def _lexer(host: Host, handle: Any) -> Any:
    lexer = host.lexers.get(handle) if isinstance(handle, int) else None
    if lexer is None:
        raise TypeError("expected an aici.DynamicLexer")
    return lexer


@_word
def new_lexer(host: Host, additional_id_chars: str | None = None) -> int:
    handle = _new_handle(host)
    host.lexers[handle] = constraints.DynamicLexer(host.vocabulary, additional_id_chars)
    host.constraints[handle] = host.lexers[handle].constraint()
    return handle


@_word
def add_identifier(host: Host, handle: int, identifier: str) -> None:
    _lexer(host, handle).add(identifier)


# Words that are awaited.


@_word
def FixedTokens(host: Host, text: str | bytes, following: Any = None) -> Pending:
    mark = None if following is None else _mark(following)
    return Pending(words.fixed_text(host.branch, text, mark), _same)


@_word
def gen_tokens(
    host: Host,
    regex: str | None = None,
    yacc: str | None = None,
    substring: str | None = None,
    substring_end: str = '"',
    options: list[str] | None = None,
    store_var: str | None = None,
    stop_at: str | None = None,
    max_tokens: int = 20,
    *,
    constraint: Any = None,
    grammar: str | None = None,
    json_schema: Any = None,
    min_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Pending:
    generate = words.generate(
        host.branch,
        regex=regex,
        yacc=yacc,
        substring=substring,
        substring_end=substring_end,
        options=options,
        store_var=store_var,
        stop_at=stop_at,
        max_tokens=max_tokens,
        constraint=None if constraint is None else _constraint(host, _attribute(constraint, "handle")),
        grammar=grammar,
        json_schema=json_schema,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    words.prepare(host.branch, generate)
    return Pending(generate, list)


@_word
def gen_text(host: Host, *args: Any, **kwargs: Any) -> Pending:
    def text(tokens: list[int]) -> str:
        return host.vocabulary.detokenize(tokens).decode(errors="replace")

    return Pending(gen_tokens(host, *args, **kwargs).awaitable, text)


@_word
def fork(host: Host, branches: Any) -> Pending:
    forks = branches if isinstance(branches, int) else _decisions(host, branches)
    return Pending(_own(words.fork(host.branch, forks)), lambda decided: decided.branch)


@_word
def decide(host: Host, branches: Any) -> Pending:
    def seen(decided: Decided) -> tuple[int, list[int], bool]:
        ends = host.vocabulary.eos_token_ids
        return decided.backtrack, decided.tokens, any(token in ends for token in decided.tokens)

    return Pending(_own(words.decide(host.branch, _decisions(host, branches))), seen)


def _own(decide: Decide) -> Decide:
    """Every part was made and checked here."""
    decide.own = True
    return decide


def _decisions(host: Host, branches: Any) -> list[BranchDecision]:
    """Branches as the prelude writes them: (mask or None, [(when_sampled, backtrack, ff_tokens), ...])."""
    try:
        # First: what is refused is not copied.
        words.check_count(host.branch, len(branches))
        for _, splices in branches:
            words.check_splices(host.branch, [(when, ff) for when, _, ff in splices])
        return [
            BranchDecision(
                splices=[
                    Splice(when_sampled=_ids(when), backtrack=back, ff_tokens=_existing(host, ff))
                    for when, back, ff in splices
                ],
                sample_mask=None if bits is None else _mask(host, bits),
            )
            for bits, splices in branches
        ]
    except (TypeError, ValueError) as error:
        raise type(error)(f"not a list of branches: {error}") from None


def _existing(host: Host, tokens: Any) -> list[int]:
    for token in _ids(tokens):
        if not 0 <= token < host.vocabulary.size:
            raise ValueError(f"token {token} is not in 0..{host.vocabulary.size - 1}")
    return list(tokens)


def _mask(host: Host, bits: Any) -> TokenSet:
    mask = _set(host, bits)
    if not mask.num_set():
        raise ValueError("sample_mask allows no token")
    return mask


@_word
def wait_vars(host: Host, *names: str) -> Pending:
    waited = words.wait_vars(host.branch, names)

    def repeated(values: list[bytes]) -> list[bytes]:
        answer = words.in_order(names, waited, values)
        # A long value that is named often is one object here, and is copied for each name on its way.
        _check_size(answer, "values")
        return answer

    return Pending(waited, _same if len(waited.names) == len(names) else repeated)


@_word
def GetPrompt(host: Host) -> Pending:
    return Pending(awaits.GetPrompt(), _same)


@_word
def StopToken(host: Host) -> Pending:
    return Pending(awaits.Stop(), _same)


@_word
def Noop(host: Host) -> Pending:
    return Pending(awaits.Decide(MidProcessResult.noop()), lambda decided: decided.tokens)
