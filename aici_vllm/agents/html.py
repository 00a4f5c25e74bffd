"""The sample tree as one self-contained HTML page: tree, scores, feedback and conversations."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from aici_vllm.agents.messages import MESSAGE_TYPES, AIMessage, DataMessage, SystemMessage, UserMessage
from aici_vllm.agents.samples import SampleNode, format_score, pre_order
from aici_vllm.agents.scoring import UCT, AbstractScoringMethod, score

PREVIEW_LENGTH = 90

_STATES = {True: ("passed", "passing"), False: ("failed", "failed"), None: ("open", "not checked")}
_ROLES = {SystemMessage: "system", UserMessage: "user", AIMessage: "assistant", DataMessage: "data"}


def samples_html(
    node: SampleNode,
    scoring: AbstractScoringMethod | None = None,
    *,
    title: str = "Samples",
    active_id: int | None = None,
    rng: random.Random | None = None,
) -> str:
    """One HTML page that shows the tree under `node`. It loads nothing from anywhere.

    Each sample is a row with its id, wins/visits, score and feedback, and opens to its conversation; rows
    with children fold. Messages a sample shares with its parent are written once and shown on demand.
    `active_id` marks the active sample. The page follows the reader's light or dark setting.
    """
    scoring = UCT() if scoring is None else scoring
    nodes = list(pre_order(node))
    depths: dict[int, int] = {}
    rows = []
    for current in nodes:
        is_top = current is node or current.parent is None
        depth = 0 if is_top else depths[id(current.parent)] + 1
        depths[id(current)] = depth
        rows.append(_row(current, depth, is_top, score(current, scoring, rng), current.id == active_id))
    values = {
        "title": escape(title),
        "style": _asset("samples.css"),
        "script": _asset("samples.js"),
        "summary": _summary(nodes),
        "rows": "\n".join(rows),
    }
    # One pass, so that no value is taken for a placeholder.
    return re.sub(r"%%(\w+)%%", lambda found: values[found.group(1)], _asset("samples.html"))


def _asset(name: str) -> str:
    return files("aici_vllm.agents").joinpath(name).read_text(encoding="utf-8")


def _summary(nodes: Sequence[SampleNode]) -> str:
    passing = sum(1 for node in nodes if node.success is True)
    failed = sum(1 for node in nodes if node.success is False)
    return f"{len(nodes)} nodes, {passing} passing, {failed} failed"


def _row(node: SampleNode, depth: int, is_top: bool, value: float, active: bool) -> str:
    state, state_text = _STATES[node.success]
    parent = "" if is_top or node.parent is None else f' data-parent="{node.parent.id}"'
    fold = (
        '<button class="fold" aria-expanded="true" aria-label="Fold children"></button>'
        if node.children
        else ""
    )
    mark = '<span class="mark">active</span>' if active else ""
    return (
        f'<li class="node {state}{" active" if active else ""}" id="n{node.id}" data-id="{node.id}"{parent} '
        f'data-depth="{depth}" style="--depth:{min(depth, 24)}">\n'
        f'<div class="gutter">{fold or "<span class=leaf></span>"}</div>\n'
        f"<details><summary>"
        f'<span class="state" title="{state_text}"></span><span class="id">{node.id}</span>'
        f'<span class="stat">{node.wins}/{node.visits}</span>'
        f'<span class="score">score {format_score(value)}</span>'
        f'<span class="depth">depth {depth}</span>{mark}'
        f'<span class="preview">{escape(_preview(node))}</span></summary>\n'
        f"{_feedback(node)}{_conversation(node, is_top)}</details>\n</li>"
    )


def _preview(node: SampleNode) -> str:
    """The last reply in one line; for other data its printed form."""
    if not _is_conversation(node.data):
        return repr(node.data)[:PREVIEW_LENGTH]
    replies = [message for message in node.data if isinstance(message, AIMessage | DataMessage)]
    text = str(replies[-1].content) if replies else "prompt"
    return " ".join(text.split())[:PREVIEW_LENGTH]


def _feedback(node: SampleNode) -> str:
    text = node.feedback.strip()
    return f'<div class="feedback"><h4>Feedback</h4><pre>{escape(text)}</pre></div>\n' if text else ""


def _conversation(node: SampleNode, is_top: bool) -> str:
    if not _is_conversation(node.data):
        return f'<div class="messages"><pre>{escape(repr(node.data))}</pre></div>'
    shared = 0 if is_top or node.parent is None else _shared_length(node.parent.data, node.data)
    button = (
        f'<button class="earlier" data-count="{shared}">Show {shared} earlier messages</button>'
        if shared
        else ""
    )
    own = "\n".join(_message(message) for message in node.data[shared:])
    return f'{button}<div class="messages" data-shared="{shared}">{own}</div>'


def _is_conversation(data: Any) -> bool:
    return isinstance(data, list) and all(isinstance(message, MESSAGE_TYPES) for message in data)


def _shared_length(parent: Any, child: Sequence[Any]) -> int:
    """How many messages two conversations have in common at their beginning."""
    if not _is_conversation(parent):
        return 0
    length = 0
    for mine, theirs in zip(parent, child, strict=False):
        if mine is not theirs and mine != theirs:
            break
        length += 1
    return length


def _message(message: Any) -> str:
    role = _ROLES[type(message)]
    return (
        f'<div class="message {role}"><span class="role">{role}</span>'
        f"<pre>{escape(str(message.content))}</pre>{_images(message)}</div>"
    )


def _images(message: Any) -> str:
    """Inline images are shown, others only named: the page must not load anything."""
    shown = []
    for url in getattr(message, "images", ()):
        if url.startswith("data:image/"):
            shown.append(f'<img alt="attached image" src="{escape(url)}">')
        else:
            shown.append(f'<span class="link">{escape(url)}</span>')
    return "".join(shown)
