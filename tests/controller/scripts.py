"""What tests of the sandbox share: a small vocabulary, and a request driven to its end."""

from __future__ import annotations

from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from constraints import Vocabulary
from tests.controller.fake_engine import FakeEngine

EOS = 256
VOCABULARY = Vocabulary(
    [*(bytes([byte]) for byte in range(256)), None, b"he", b"hello", b" wor"],
    eos_token_ids=[EOS],
    specials={EOS: b"<eos>"},
)
"""Every byte, the end, and three longer tokens; text is tokenized greedily."""


def new_group(limits: Limits | None = None, *, arg: str = "", context: int = 1000) -> Group:
    return Group(VOCABULARY, [ord("p")], max_tokens=context, context=context, limits=limits, arg=arg)


def run_script(pool: SandboxPool, source: str, group: Group | None = None) -> FakeEngine:
    """Run a script to the end of its request."""
    engine = FakeEngine(group or new_group(), pool.wait)
    engine.run(lambda branch: pool.program(source, branch))
    return engine


def script(body: str, *, start: str = "aici.start(main())") -> str:
    """A script whose main coroutine is `body`; the body's first line is line 5."""
    lines = body.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    inner = "\n".join("    " + line[indent:] for line in lines)
    return f"import aici\n\n\nasync def main():\n{inner}\n\n\n{start}\n"
