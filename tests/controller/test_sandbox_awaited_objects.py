"""Awaits are wrapped exactly where Python's own parser sees them, and nothing else changes."""

from __future__ import annotations

import ast

import pytest

from aici_vllm.controller.sandbox.awaited_objects import WRAPPER, wrap_awaits


class Wrap(ast.NodeTransformer):
    """The oracle: the same change, made on the tree."""

    def visit_Await(self, node: ast.Await) -> ast.Await:
        self.generic_visit(node)
        return ast.Await(ast.Call(ast.Name(WRAPPER, ast.Load()), [node.value], []))


@pytest.mark.parametrize(
    "body",
    [
        "await x",
        "y = await x.y.z",
        "await f(a, await g(b))[3].c + 1",
        "x = (await t\n .foo(1)\n)",
        "await t\n.5",
        "'await x'; await y # await z",
        "f(await x, await (y))",
        "await (x)(3)",
        "if await x: pass",
        "await x if a else b",
        "[await x for x in y]",
        "awaiting = 1; x.await_",
        "await t;await u",
        "await aici.FixedTokens('a(', following=l)",
        'await aici.FixedTokens(f"{x}) (")',
        "await x\\\n  .y",
        "await {1: 2}[1]",
        "await [x][0]",
        "await x .y",
        "await x [3]",
        "await x\n(y)",
        "print('''await x''', '\\\\', \"await 'y\")",
        "await a@b",
        "await größe(' # ')  # await it",
        "x = {await k: await v for k, v in y}",
    ],
)
def test_wraps_what_python_awaits(body: str) -> None:
    source = "async def f():\n  " + body.replace("\n", "\n  ") + "\n"
    wrapped = wrap_awaits(source)
    assert ast.dump(ast.parse(wrapped)) == ast.dump(Wrap().visit(ast.parse(source)))
    assert wrapped.count("\n") == source.count("\n")


@pytest.mark.parametrize(
    "broken", ["await", "await )", "await (x", "'await x", '"""await x', "await x)(", "((await x"]
)
def test_broken_source_stays_broken(broken: str) -> None:
    assert "await" in wrap_awaits(broken)
