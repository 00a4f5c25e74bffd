"""The call tree as one self-contained HTML page."""

from __future__ import annotations

import html
import json
from pathlib import Path

from .calltree import CallNode


def tree_page(node: CallNode, title: str = "Call tree") -> str:
    """An HTML page of the subtree, with its data inside and nothing loaded from anywhere.

    Prompts and results are inserted as text only, so they cannot bring markup or script into the page.
    """
    # "<" is escaped so that no text of the tree can close the script element that holds the data.
    data = json.dumps({"root": node.as_dict(), "totals": node.totals()}, ensure_ascii=False)
    page = _PAGE.replace("@TITLE@", html.escape(title))
    return page.replace("@DATA@", data.replace("<", "\\u003c"))


def write_tree_page(node: CallNode, path: str | Path, title: str = "Call tree") -> Path:
    """Write `tree_page` to a file and return its path."""
    target = Path(path)
    target.write_text(tree_page(node, title), encoding="utf-8")
    return target


_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8884; --dim: #888;
  --bar: #4a90d9; --ok: #2e8b57; --bad: #c0392b; --run: #b8860b; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; }
h1 { font-size: 1.25rem; margin: 0 0 .75rem; }
.totals { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; margin-bottom: 1rem; }
.totals b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.totals span { color: var(--dim); font-size: .8rem; }
.row { display: grid;
  grid-template-columns: minmax(16rem, 2fr) 3rem 11rem 5rem minmax(6rem, 1fr) minmax(10rem, 1.5fr);
  gap: 0 .75rem; align-items: center; padding: .2rem 0; border-bottom: 1px solid var(--line); }
.head { color: var(--dim); font-size: .8rem; position: sticky; top: 0; background: Canvas; }
.name { display: flex; align-items: baseline; overflow: hidden; padding-left: calc(var(--level) * 1.1rem); }
.name button { all: unset; cursor: pointer; width: 1.1rem; flex: none; color: var(--dim); }
.name button:focus-visible { outline: 2px solid var(--bar); }
.kind { flex: none; font-weight: 600; margin-right: .5rem; }
.text { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; text-align: right; }
.track { position: relative; height: .7rem; background: #8882; border-radius: 2px; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 2px; background: var(--bar); }
.done .kind { color: var(--ok); }
.failed .kind, .failed .outcome { color: var(--bad); }
.running .kind { color: var(--run); }
.failed .track i { background: var(--bad); }
.more { cursor: pointer; margin: .3rem 0 .3rem 2rem; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<div class="totals" id="totals"></div>
<div class="row head"><div>call</div><div class="number">depth</div>
<div class="number">tokens in (cached) + out</div><div class="number">seconds</div>
<div>when</div><div>result or error</div></div>
<div id="tree"></div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const { root, totals } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 100;
const span = Math.max(root.seconds, 1e-9);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showTotals() {
  const shown = [
    ["nodes", totals.nodes], ["model calls", totals.calls], ["prompt tokens", totals.prompt_tokens],
    ["of these cached", totals.cached_tokens], ["generated tokens", totals.generated_tokens],
    ["seconds", root.seconds.toFixed(2)],
  ];
  for (const [label, value] of shown) {
    const box = element("div");
    box.append(element("b", "", String(value)), element("span", "", label));
    document.getElementById("totals").append(box);
  }
}

function tokens(node) {
  if (node.prompt_tokens === null) return "-";
  return `${node.prompt_tokens} (${node.cached_tokens}) + ${node.generated_tokens}`;
}

function bar(node) {
  const track = element("div", "track");
  const fill = element("i");
  fill.style.left = `${Math.min(100, 100 * node.start / span)}%`;
  fill.style.width = `${Math.min(100, 100 * node.seconds / span)}%`;
  track.append(fill);
  track.title = `${node.start.toFixed(3)} s + ${node.seconds.toFixed(3)} s`;
  return track;
}

function nameCell(node, level, toggle) {
  const name = element("div", "name");
  name.style.setProperty("--level", level);
  const button = element("button", "", node.children.length ? "▸" : "");
  button.type = "button";
  button.setAttribute("aria-label", "open or close");
  button.addEventListener("click", () => toggle());
  const label = node.kind === "run" ? `run · ${node.iterations} turns` : "query";
  const text = element("span", "text", node.prompt);
  text.title = (node.model ? `[${node.model}] ` : "") + node.prompt;
  name.append(button, element("span", "kind", label), text);
  return [name, button];
}

function addNode(node, level, into) {
  const row = element("div", `row ${node.state}`);
  const below = element("div");
  let filled = false;
  const [name, button] = nameCell(node, level, () => open(below.hidden));
  const ended = node.state === "running" ? "running" : "";
  const outcome = element("div", "text outcome", node.error ?? node.result ?? ended);
  outcome.title = outcome.textContent;
  row.append(name, element("div", "number", node.depth), element("div", "number", tokens(node)),
    element("div", "number", node.seconds.toFixed(3)), bar(node), outcome);
  below.hidden = true;
  into.append(row, below);
  function open(visible) {
    if (visible && !filled) { filled = true; addChildren(node, level + 1, below, 0); }
    below.hidden = !visible;
    if (node.children.length) button.textContent = visible ? "▾" : "▸";
  }
  if (level < 2) open(true);
}

function addChildren(node, level, into, from) {
  node.children.slice(from, from + PAGE).forEach((child) => addNode(child, level, into));
  const rest = node.children.length - from - PAGE;
  if (rest <= 0) return;
  const more = element("button", "more", `show ${Math.min(rest, PAGE)} of ${rest} more`);
  more.type = "button";
  more.addEventListener("click", () => { more.remove(); addChildren(node, level, into, from + PAGE); });
  into.append(more);
}

showTotals();
addNode(root, 0, document.getElementById("tree"));
document.body.dataset.ready = "yes";
</script>
</body>
</html>
"""
