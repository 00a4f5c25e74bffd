"""What tests of native controllers share: a request driven to its end, and a model with a text in mind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import Controller, NativeProgram
from tests.controller.fake_engine import Choose, FakeEngine, lowest
from tests.controller.scripts import EOS, VOCABULARY

PROMPT = [ord("p"), ord("q")]


def saying(texts: str | Mapping[int, str]) -> Choose:
    """A model that writes one text byte by byte, or one per branch, and then ends; it takes what it may."""
    said: dict[int, int] = {}

    def choose(branch: Branch, allowed: list[int]) -> int:
        text = (texts if isinstance(texts, str) else texts.get(branch.index, "")).encode()
        place = said.get(branch.index, 0)
        said[branch.index] = place + 1
        wanted = text[place] if place < len(text) else EOS
        return wanted if wanted in allowed else allowed[0]

    return choose


def group_of(
    *,
    prompt: list[int] | None = None,
    max_tokens: int = 200,
    context: int = 1000,
    limits: Limits | None = None,
    arg: str = "",
) -> Group:
    return Group(
        VOCABULARY,
        PROMPT if prompt is None else prompt,
        max_tokens=max_tokens,
        context=context,
        limits=limits,
        arg=arg,
    )


def engine_of(controller: Controller, choose: Choose = lowest, **group: Any) -> FakeEngine:
    """A request of `controller`, started and not yet stepped."""
    engine = FakeEngine(group_of(**group), choose=choose)
    engine.group.start(lambda branch: NativeProgram(controller, engine.group.arg, branch))
    return engine


def run(controller: Controller, choose: Choose = lowest, **group: Any) -> FakeEngine:
    """A request of `controller`, driven to its end."""
    engine = FakeEngine(group_of(**group), choose=choose)
    engine.run(lambda branch: NativeProgram(controller, engine.group.arg, branch))
    return engine


def texts(engine: FakeEngine) -> list[str]:
    return [engine.text(branch) for branch in engine.group.branches]


def reasons(engine: FakeEngine) -> list[str | None]:
    return [branch.finish_reason for branch in engine.group.branches]


def error(engine: FakeEngine, index: int = 0) -> str:
    """Why a branch failed; it must have."""
    branch = engine.group.branches[index]
    assert branch.finish_reason == "fail" and branch.error
    return branch.error


def logs(engine: FakeEngine, index: int = 0) -> str:
    return str(engine.group.branches[index].log)
