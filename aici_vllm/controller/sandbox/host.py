"""What a sandboxed script can ask: one function for each word of `prelude.py`, run in this process.

Whatever comes in was made by the script, so everything is checked here or in `words`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic_monty

from aici_vllm.controller import awaits, words
from aici_vllm.controller.awaits import Awaitable
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.decisions import MidProcessResult

LARGEST_ARGUMENT = 1 << 20
"""Characters, bytes and items that one call may hand over, all its arguments together."""


@dataclass(slots=True)
class Pending:
    """The answer of a word that is awaited: what the branch must do, and how its result looks to the script."""

    awaitable: Awaitable
    convert: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


class Host:
    """The side of a branch that its script can reach."""

    def __init__(self, branch: Branch):
        self.branch = branch

    def fork(self, branch: Branch) -> "Host":
        """The same for a copy of the script that goes on as `branch`."""
        return Host(branch)

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Answer the word `name`: a value, or a `Pending` for one that is awaited.

        Raises:
            Exception: whatever the script should see raised at its line.
        """
        log_level, *given = args
        _check_size([given, kwargs])
        if isinstance(log_level, int):
            self.branch.log_level = log_level
        word, signature = WORDS[name]
        try:
            signature.bind(self, *given, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        return word(self, *given, **kwargs)


Word = Callable[..., Any]
WORDS: dict[str, tuple[Word, inspect.Signature]] = {}
"""Every word that `prelude.py` asks for, by its name in a script."""


def _word(function: Word) -> Word:
    WORDS[function.__name__] = (function, inspect.signature(function))
    return function


def _check_size(value: Any) -> None:
    size = _size(value)
    if size > LARGEST_ARGUMENT:
        raise ValueError(f"the arguments of one call may hold {LARGEST_ARGUMENT} characters, not {size}")


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return len(value) + sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) + sum(map(_size, value))
    return 0


def _mark(label: Any) -> int:
    """The mark of a `Label`, which crosses as a picture of the sandbox's object."""
    mark = label.attributes.get("mark") if isinstance(label, pydantic_monty.MontyClassProxy) else None
    if not isinstance(mark, int):
        raise TypeError(f"following= takes a Label, not {label!r}")
    return mark


def _ids(tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise TypeError("expected a list of token ids")
    return tokens


# Text, tokens and variables.


@_word
def tokenize(host: Host, text: str | bytes) -> list[int]:
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"tokenize() takes str or bytes, not {type(text).__name__}")
    return host.branch.group.vocabulary.tokenize(text)


@_word
def detokenize(host: Host, tokens: list[int]) -> bytes:
    return host.branch.group.vocabulary.detokenize(_ids(tokens))


@_word
def token_repr(host: Host, token: int) -> str:
    return host.branch.group.vocabulary.token_repr(_ids([token])[0])


@_word
def tokens_repr(host: Host, tokens: list[int]) -> str:
    return host.branch.group.vocabulary.tokens_repr(_ids(tokens))


@_word
def eos_token(host: Host) -> int:
    return host.branch.group.vocabulary.eos_token_id


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
    found = words.get_var(host.branch, name)
    if found is None:
        raise AssertionError(f"Variable {name} is unset")
    text = found.decode(errors="replace")
    if text != value:
        raise AssertionError(f"Variable {name}: {text!r} != {value!r}")


@_word
def check_vars(host: Host, variables: dict[str, str]) -> None:
    if not isinstance(variables, dict):
        raise TypeError(f"check_vars() takes a dict, not {type(variables).__name__}")
    for name, value in variables.items():
        check_var(host, name, value)


@_word
def get_tokens(host: Host) -> list[int]:
    return list(host.branch.sequence.tokens)


@_word
def get_prompt_len(host: Host) -> int:
    return host.branch.sequence.prompt_len


@_word
def get_config(host: Host, name: str) -> int:
    return int(name in ("fork", "backtrack", "ff_tokens"))


@_word
def Label(host: Host) -> int:
    return host.branch.mark()


@_word
def tokens_since(host: Host, mark: int) -> list[int]:
    return words.tokens_since(host.branch, mark)


@_word
def text_since(host: Host, mark: int) -> str:
    return words.text_since(host.branch, mark)


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
        grammar=grammar,
        json_schema=json_schema,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    return Pending(generate, _same)


@_word
def gen_text(host: Host, *args: Any, **kwargs: Any) -> Pending:
    def text(tokens: list[int]) -> str:
        return host.branch.group.vocabulary.detokenize(tokens).decode(errors="replace")

    return Pending(gen_tokens(host, *args, **kwargs).awaitable, text)


@_word
def fork(host: Host, forks: int) -> Pending:
    return Pending(words.fork(host.branch, forks), lambda decided: decided.index)


@_word
def wait_vars(host: Host, *names: str) -> Pending:
    return Pending(words.wait_vars(host.branch, names), _same)


@_word
def GetPrompt(host: Host) -> Pending:
    return Pending(awaits.GetPrompt(), _same)


@_word
def StopToken(host: Host) -> Pending:
    return Pending(awaits.Stop(), _same)


@_word
def Noop(host: Host) -> Pending:
    return Pending(awaits.Decide(MidProcessResult.noop()), lambda decided: decided.tokens)
