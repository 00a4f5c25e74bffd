"""The words of a controller in plain Python: `from aici_vllm import aici`.

A controller is a coroutine function that awaits these words. The same words, with the same meaning,
are there in the sandbox for scripts that arrive in a request.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

import constraints
from aici_vllm.controller import words
from aici_vllm.controller.awaits import Awaitable, Decided, GetPrompt, Stop
from aici_vllm.controller.branch import Branch as _Branch
from aici_vllm.controller.decisions import BranchDecision as Branch
from aici_vllm.controller.decisions import MidProcessResult, Splice
from aici_vllm.controller.program import running_program
from constraints import Constraint, Vocabulary

__all__ = [
    "AiciAsync",
    "AiciCallbacks",
    "Branch",
    "CfgConstraint",
    "ChooseConstraint",
    "ConstrainedToken",
    "Constraint",
    "DynamicLexer",
    "FixedTokens",
    "GetPrompt",
    "Label",
    "LarkConstraint",
    "MidProcessResult",
    "NextToken",
    "Noop",
    "RegexConstraint",
    "Splice",
    "StopToken",
    "SubStrConstraint",
    "TokenSet",
    "all_tokens",
    "append_var",
    "backtrack_supported",
    "check_var",
    "check_vars",
    "controller_arg",
    "detokenize",
    "eos_token",
    "fork",
    "fork_supported",
    "gen_text",
    "gen_tokens",
    "get_config",
    "get_prompt_len",
    "get_tokens",
    "get_var",
    "log_level",
    "set_var",
    "start",
    "test",
    "token_repr",
    "tokenize",
    "tokens_repr",
    "wait_vars",
]

T = TypeVar("T")
Token = int
log_level = 1
"""From 1 on, fixed and generated text is logged; set it to 0 to be quiet."""


def _ask(word: Callable[..., T], *args: Any) -> T:
    program = running_program()
    program.branch.log_level = log_level
    return program.ask(word, *args)


def _branch() -> _Branch:
    branch = running_program().branch
    branch.log_level = log_level
    return branch


# Text and tokens.


class Label:
    """A position in the text: `FixedTokens(..., following=label)` takes back what came after it."""

    def __init__(self) -> None:
        self._mark = _ask(_Branch.mark)
        weakref.finalize(self, _branch().sequence.release, self._mark).atexit = False

    @property
    def ptr(self) -> int:
        """How many tokens stand before the label.

        Raises:
            ValueError: the text it stood in was taken back.
        """
        return _ask(words.position, self._mark)

    def tokens_since(self) -> list[Token]:
        """The tokens after the label."""
        return _ask(words.tokens_since, self._mark)

    def text_since(self) -> str:
        """The text after the label."""
        return _ask(words.text_since, self._mark)


class TokenSet(constraints.TokenSet):
    """A set of tokens, empty at first, as large as the model's vocabulary."""

    def __init__(
        self, size: int | None = None, vocabulary: Vocabulary | None = None, row: Any = None
    ) -> None:
        vocabulary = vocabulary or _branch().group.vocabulary
        super().__init__(vocabulary.size if size is None else size, vocabulary, row)


def tokenize(text: str | bytes) -> list[Token]:
    """The model's tokens for `text`: nothing added in front, special tokens recognised."""
    return _branch().group.vocabulary.tokenize(text)


def detokenize(tokens: list[Token]) -> bytes:
    """The bytes of `tokens`; special tokens have none."""
    return _branch().group.vocabulary.detokenize(tokens)


def token_repr(token: Token) -> str:
    """One token, readable."""
    return _branch().group.vocabulary.token_repr(token)


def tokens_repr(tokens: list[Token]) -> str:
    """Tokens, readable, with their borders."""
    return _branch().group.vocabulary.tokens_repr(tokens)


def eos_token() -> Token:
    """The model's end-of-sequence token."""
    return _branch().group.vocabulary.eos_token_id


def all_tokens() -> constraints.TokenSet:
    """Every token, special ones too."""
    return _branch().group.vocabulary.all_tokens()


def get_tokens() -> list[Token]:
    """All tokens so far, the prompt too."""
    return _ask(words.get_tokens)


def get_prompt_len() -> int:
    """How many tokens the prompt had at the start."""
    return _branch().initial_prompt_len


def controller_arg() -> str:
    """The string that came with the controller."""
    return _branch().group.arg


def get_config(name: str) -> int:
    """1 for what this host can do ("fork", "backtrack", "ff_tokens"), 0 for anything else."""
    return words.get_config(name)


def fork_supported() -> bool:
    """Always True here."""
    return True


def backtrack_supported() -> bool:
    """Always True here."""
    return True


# Variables.


def get_var(name: str) -> bytes | None:
    """The value of a shared variable; None when it is not set."""
    return _ask(words.get_var, name)


def set_var(name: str, value: str | bytes) -> None:
    """Set a variable for every branch of the request."""
    _ask(words.set_var, name, value)


def append_var(name: str, value: str | bytes) -> None:
    """Add to the end of a shared variable; a missing one starts empty."""
    _ask(words.append_var, name, value)


async def wait_vars(*names: str) -> list[bytes]:
    """Sleep until all variables are set; their values. Costs no forward pass."""
    waited = words.wait_vars(_branch(), names)
    return words.in_order(names, waited, await waited)


def check_var(name: str, expected: str | bytes) -> None:
    """Raise AssertionError unless the variable holds `expected`."""
    _ask(words.check_var, name, expected)


def check_vars(expected: dict[str, str]) -> None:
    """`check_var` for each."""
    # What was asked is remembered for forks, and the script may change its own.
    _ask(words.check_vars, copy.copy(expected))


# Awaits.


class NextToken(Awaitable):
    """One round trip that you decide: override `mid_process`, and `post_process` to see what came of it.

    After the await: `curr_tokens` are the tokens that came, `finished` is True if EOS was among them,
    `value` is the result.
    """

    curr_tokens: list[Token]
    finished: bool
    value: Any

    def mid_process(self) -> MidProcessResult:
        """What to do next; by default, sample any token."""
        return MidProcessResult.bias(all_tokens())

    def post_process(self, backtrack: int, tokens: list[Token]) -> None:
        """`backtrack` tokens were lost and `tokens` came."""

    def is_fixed(self) -> bool:
        """Whether `mid_process` is a plain splice."""
        return False

    def __await__(self) -> Generator[Awaitable, Any, Any]:
        result = self.mid_process()
        self.value, self.curr_tokens, self.finished = [], [], False
        if result.skip_me:
            return self.value
        decided: Decided = yield words.decide(_branch(), result.branches)
        self.value = self.curr_tokens = decided.tokens
        self.finished = any(token in _branch().group.vocabulary.eos_token_ids for token in decided.tokens)
        self._index = decided.branch
        self.post_process(decided.backtrack, decided.tokens)
        return self.value


class FixedTokens(NextToken):
    """Append `text`, after taking back everything since the label `following`, in one splice."""

    def __init__(self, text: str | bytes, following: Label | None = None):
        if not isinstance(following, (Label, type(None))):
            raise TypeError(f"following= takes a Label, not {type(following).__name__}")
        mark = None if following is None else following._mark
        self._following = following
        self._fixed = _ask(words.fixed_text, text, mark)

    def is_fixed(self) -> bool:
        return True

    def mid_process(self) -> MidProcessResult:
        backtrack = 0 if self._following is None else len(self._following.tokens_since())
        return MidProcessResult.splice(backtrack, self._fixed.tokens)

    def __await__(self) -> Generator[Awaitable, Any, list[Token]]:
        self.value = self.curr_tokens = yield self._fixed
        self.finished = False
        return self.curr_tokens


class StopToken(NextToken):
    """End the branch here. Nothing after it runs."""

    def mid_process(self) -> MidProcessResult:
        return MidProcessResult.stop()

    def __await__(self) -> Generator[Awaitable, Any, Any]:
        yield Stop()


class Noop(NextToken):
    """A round trip that changes nothing."""

    def is_fixed(self) -> bool:
        return True

    def mid_process(self) -> MidProcessResult:
        return MidProcessResult.noop()


class ConstrainedToken(NextToken):
    """Sample one token that the constraint allows. `mk_constraint` is called once, at the first await."""

    def __init__(self, mk_constraint: Callable[[], Constraint]):
        self._make = mk_constraint
        self._constraint: Constraint | None = None

    def mid_process(self) -> MidProcessResult:
        if self._constraint is None:
            self._constraint = self._make()
            if self._constraint.vocabulary is None:
                self._constraint.vocabulary = _branch().group.vocabulary
        allowed = TokenSet()
        self._constraint.allow_tokens(allowed)
        if not allowed.num_set():
            if log_level >= 1:
                print("Constraint doesn't allow any tokens; adding EOS")
            allowed[eos_token()] = True
        return MidProcessResult.bias(allowed)

    def post_process(self, backtrack: int, tokens: list[Token]) -> None:
        assert self._constraint is not None
        for token in tokens:
            self._constraint.append_token(token)
        self.finished = self.finished or self._constraint.eos_forced()


async def gen_tokens(
    regex: str | None = None,
    yacc: str | None = None,
    substring: str | None = None,
    substring_end: str = '"',
    options: list[str] | None = None,
    store_var: str | None = None,
    stop_at: str | None = None,
    max_tokens: int = 20,
    *,
    constraint: Constraint | None = None,
    json_schema: Any = None,
    grammar: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    min_tokens: int = 0,
) -> list[Token]:
    """Sample up to `max_tokens` tokens under at most one constraint; the tokens, EOS included.

    Ends at EOS, when the constraint can only end, or after `stop_at`. What the constraint forces is
    spliced, not sampled. `store_var` gets the text.

    Raises:
        ValueError: bad arguments, or a constraint that does not compile.
    """
    request = words.generate(
        _branch(),
        regex=regex,
        yacc=yacc,
        substring=substring,
        substring_end=substring_end,
        options=options,
        grammar=grammar,
        json_schema=json_schema,
        constraint=constraint,
        store_var=store_var,
        stop_at=stop_at,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    tokens: list[Token] = await request
    return tokens


async def gen_text(*args: Any, **kwargs: Any) -> str:
    """`gen_tokens`, decoded; bytes that are no UTF-8 become U+FFFD."""
    return detokenize(await gen_tokens(*args, **kwargs)).decode(errors="replace")


async def fork(branches: int | list[Branch]) -> int:
    """Become several branches that share everything so far; the index of this one, 0 for the parent.

    Raises:
        ValueError: fewer than one branch.
    """
    decided: Decided = await words.fork(_branch(), branches)
    return decided.branch


# Constraints under the names that scripts know.


def RegexConstraint(pattern: str) -> Constraint:
    """Text that matches the pattern from start to end."""
    return constraints.regex(_branch().group.vocabulary, pattern)


def CfgConstraint(grammar: str) -> Constraint:
    """Text that an LR(1) grammar in yacc's language accepts."""
    return constraints.yacc(_branch().group.vocabulary, grammar)


def LarkConstraint(grammar: str) -> Constraint:
    """Text that a Lark grammar accepts."""
    return constraints.lark(_branch().group.vocabulary, grammar)


def SubStrConstraint(template: str, stop_at: str) -> Constraint:
    """A run of whole words of `template`, then `stop_at`."""
    return constraints.substring(_branch().group.vocabulary, template, stop_at)


def ChooseConstraint(options: list[str]) -> Constraint:
    """One of the options."""
    return constraints.options(_branch().group.vocabulary, options)


def DynamicLexer(additional_id_chars: str | None = None) -> "constraints.DynamicLexer":
    """Any text whose identifiers are all among those added."""
    return constraints.DynamicLexer(_branch().group.vocabulary, additional_id_chars)


# Controllers as objects.


class AiciCallbacks:
    """A controller as an object: the engine asks `mid_process` before every token."""

    def init_prompt(self, prompt: list[Token]) -> None:
        """Called once, with the prompt."""

    def mid_process(self, backtrack: int, tokens: list[Token], fork_group: list[int]) -> MidProcessResult:
        """`backtrack` tokens were lost and `tokens` came since the last call; what to do next.

        `fork_group` holds the branches made by the last answer, this one's index first.
        """
        raise NotImplementedError("an AiciCallbacks object must answer mid_process")


class AiciAsync:
    """A coroutine function as a controller object: handing it over is handing over the function."""

    def __init__(self, coroutine_function: Callable[..., Coroutine[Any, Any, Any]]):
        if not inspect.iscoroutinefunction(coroutine_function):
            raise TypeError(f"AiciAsync takes an async function, not {coroutine_function!r}")
        self.coroutine_function = coroutine_function


class _Round(NextToken):
    def __init__(self, result: MidProcessResult):
        self._result = result

    def mid_process(self) -> MidProcessResult:
        return self._result

    def post_process(self, backtrack: int, tokens: list[Token]) -> None:
        self.value = (backtrack, tokens, self._index)


async def _drive(callbacks: AiciCallbacks) -> None:
    callbacks.init_prompt(await GetPrompt())
    backtrack, tokens, group = 0, list[Token](), [0]
    while True:
        result = callbacks.mid_process(backtrack, tokens, group)
        if result.skip_me:
            result = MidProcessResult.noop()
        if not result.branches:
            return
        backtrack, tokens, index = await _Round(result)
        group = [index, *(other for other in range(len(result.branches)) if other != index)]


def controller_from(made: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A coroutine function from what users hand over: one, or a class of `AiciCallbacks`.

    Raises:
        TypeError: it is neither.
    """
    if inspect.iscoroutinefunction(made):
        return made
    if isinstance(made, AiciAsync):
        return made.coroutine_function
    if isinstance(made, type) and issubclass(made, AiciCallbacks):
        return lambda: _drive(made())
    raise TypeError(f"a controller is an async function or a class of AiciCallbacks, not {made!r}")


def start(controller: Any) -> None:
    """Only scripts call this; in plain Python hand the function to `aici_vllm.run`."""
    if inspect.iscoroutine(controller):
        controller.close()
    raise RuntimeError(
        "aici.start() belongs in a script that an engine runs: use `aici run script.py`, send the script "
        "with a request, or pass the function itself to aici_vllm.run(llm, controller, prompts)"
    )


test = start
