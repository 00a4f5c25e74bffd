"""The call tree: one node per model call and per child run, with depth, tokens, time, result and error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat import Usage, usage_of

NodeKind = Literal["run", "query"]
PREVIEW_CHARS = 80


def preview(text: object) -> str:
    """The first 80 characters of a prompt or a result, with "?" for what UTF-8 cannot hold."""
    return str(text)[:PREVIEW_CHARS].encode("utf-8", "replace").decode("utf-8")


@dataclass(eq=False)
class CallNode:
    """One node: a run (an RLM with a REPL) or a query (one plain model call).

    Times are seconds on the monotonic clock. `usage` counts this node's own model calls only, and stays None
    while the chat function reports no tokens.
    """

    kind: NodeKind
    depth: int
    prompt: str
    model: str | None = None
    usage: Usage | None = None
    calls: int = 0
    iterations: int = 0
    result: str | None = None
    error: str | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    children: list[CallNode] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def child(self, kind: NodeKind, depth: int, prompt: object, model: str | None = None) -> CallNode:
        """Add a node under this one; safe from any thread."""
        node = CallNode(kind, depth, preview(prompt), model)
        with self._lock:
            self.children.append(node)
        return node

    def count(self, answer: object) -> None:
        """Count one model call and what its answer reports about tokens."""
        usage = usage_of(answer)
        with self._lock:
            self.calls += 1
            if usage is not None:
                self.usage = usage if self.usage is None else self.usage + usage

    def finish(self, result: object = None, error: str | None = None) -> None:
        """Close the node with its result or its error."""
        self.result = None if result is None else preview(result)
        self.error = error
        self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time so far, or in total once the node is closed."""
        return (self.ended if self.ended is not None else time.monotonic()) - self.started

    @property
    def state(self) -> Literal["running", "done", "failed"]:
        if self.ended is None:
            return "running"
        return "failed" if self.error is not None else "done"

    def walk(self) -> Iterator[CallNode]:
        """This node and all nodes below it, parents first."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending.extend(reversed(list(node.children)))

    def totals(self) -> dict[str, int]:
        """Nodes, model calls and reported tokens of this node and everything below it."""
        nodes = list(self.walk())
        used = sum((node.usage for node in nodes if node.usage is not None), Usage())
        return {
            "nodes": len(nodes),
            "calls": sum(node.calls for node in nodes),
            "prompt_tokens": used.prompt_tokens,
            "cached_tokens": used.cached_tokens,
            "generated_tokens": used.generated_tokens,
        }

    def as_dict(self, origin: float | None = None) -> dict[str, Any]:
        """The subtree as plain data. `start` is seconds after the root's start."""
        origin = self.started if origin is None else origin
        return {
            "kind": self.kind,
            "depth": self.depth,
            "state": self.state,
            "prompt": self.prompt,
            "model": self.model,
            "calls": self.calls,
            "iterations": self.iterations,
            "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
            "cached_tokens": self.usage.cached_tokens if self.usage else None,
            "generated_tokens": self.usage.generated_tokens if self.usage else None,
            "start": round(self.started - origin, 6),
            "seconds": round(self.seconds, 6),
            "result": self.result,
            "error": self.error,
            "children": [node.as_dict(origin) for node in list(self.children)],
        }

    def as_json(self, indent: int | None = 2) -> str:
        """The subtree as JSON."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)
