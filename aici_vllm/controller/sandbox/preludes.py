"""What a script finds in its session before it runs: the words that its source names, as a dump to be loaded.

What a script is given is part of each of its dumps, and is loaded and saved with it in nearly every turn.
So a script gets what it can name, and no more.
"""

import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_monty import MontySession

from aici_vllm.controller.sandbox.host import WORDS

_DECIDES = re.compile(
    "Constraint|ConstrainedToken|TokenSet|all_tokens|DynamicLexer|NextToken|mid_process|MidProcessResult|Splice|Branch"
)
"""Whoever names one of these may make constraints or decisions of its own."""

_DYNAMIC = frozenset(
    [
        "getattr",
        "setattr",
        "hasattr",
        "delattr",
        "vars",
        "dir",
        "eval",
        "exec",
        "__import__",
        "__dict__",
        "__getattribute__",
    ]
)
"""Whoever names one of these may reach a word without naming it."""

_TASKS = "asyncio"
"""Whoever does not name it awaits one thing at a time."""

_NAME = re.compile(r"[^\W\d]\w*")

_LABEL = frozenset(["Label", "tokens_since", "text_since"])

AWAITS = "return await _aici_ask("
ASKS = "return _aici_ask("

MOST_PRELUDES = 64
"""Sets of words for which a prelude is kept."""

LARGE = 1 << 16
"""Characters from which on a source is not searched, which would keep the engine from computing meanwhile."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a source can name.

    Attributes:
        words: the names of words that this process answers.
        label: whether it may make labels.
        decides: whether it may make constraints or decisions of its own.
        tasks: whether it may await several things at once.
    """

    words: frozenset[str]
    label: bool
    decides: bool
    tasks: bool


EVERYTHING = Needs(frozenset(WORDS), label=True, decides=True, tasks=True)


def needs(source: str) -> Needs:
    """What a script with this source must find."""
    if len(source) > LARGE:
        return EVERYTHING
    # Python reads names in this form, so that two spellings can be one name.
    names = set(_NAME.findall(source if source.isascii() else unicodedata.normalize("NFKC", source)))
    if names & _DYNAMIC or any(map(_DECIDES.search, names)):
        return EVERYTHING
    label = "Label" in names
    words = frozenset(WORDS) & (names | {"begin_main"} | (_LABEL if label else frozenset()))
    return Needs(words, label=label, decides=False, tasks=_TASKS in names)


@dataclass(frozen=True, slots=True)
class Prelude:
    """A session in which the words of a script are defined, ready to be loaded before each script.

    Attributes:
        modules: what the imports of a script get, by the name they import.
    """

    needed: Needs
    dump: bytes
    modules: dict[str, Any]


class Preludes:
    """The preludes that were needed last, for all workers. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: OrderedDict[Needs, Prelude] = OrderedDict()

    def find(self, needed: Needs) -> Prelude | None:
        """The prelude, if it was made before."""
        with self._lock:
            found = self._made.get(needed)
            if found is not None:
                self._made.move_to_end(needed)
            return found

    def make(self, needed: Needs, session: MontySession) -> Prelude:
        """Define the words in a fresh session, and keep a copy of it."""
        prelude = _make(needed, session)
        with self._lock:
            self._made[needed] = prelude
            if len(self._made) > MOST_PRELUDES:
                self._made.popitem(last=False)
        return prelude


def _make(needed: Needs, session: MontySession) -> Prelude:
    words = sorted(needed.words)
    inputs: dict[str, Any] = {
        "_aici_asked": {name: _host_function(name) for name in words if not WORDS[name].awaited},
        "_aici_awaited": {name: _host_function(name) for name in words if WORDS[name].awaited},
    }
    text = _text("prelude.py")
    if not needed.tasks:
        # The script stops at the question itself, which saves a message to the process and one from it.
        text = text.replace(AWAITS, ASKS)
    if needed.label:
        text += _text("prelude_label.py")
    if needed.decides:
        inputs["_aici_bytes"] = bytes(range(256))
        text += _text("prelude_decisions.py")
    modules = session.feed_run(text + "_aici_modules", inputs=inputs)
    return Prelude(needed, session.dump(), modules)


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text().split("\n# ---\n")[1]


def _host_function(name: str) -> Callable[..., None]:
    def asked() -> None:
        raise RuntimeError("the sandbox calls this by name only")

    # The dot keeps a script from calling it without the prelude.
    asked.__name__ = f"aici.{name}"
    return asked
