"""The HTML page: its text, and what a real browser makes of it."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aici_vllm.agents import (
    AICall,
    AIGenerate,
    AIMessage,
    DataMessage,
    RetryConfig,
    SampleNode,
    ScriptedModel,
    UserMessage,
    airetry,
    expand,
    last_output,
    pre_order,
    run,
    samples_html,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH (Debian: apt install chromium)"
)

CHROMIUM_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

VOID = {"meta", "img", "br", "link"}


class Outline(html.parser.HTMLParser):
    """Elements with their attributes; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def game() -> AICall:
    """A small tree of depth 3 with feedback and markup in the messages."""
    replies = ["<b>Blue</b>", "Red & white", "blue", "red", "blue", "blue", "yellow", "yellow"]
    model = ScriptedModel(replies)
    call = AIGenerate(
        model, "Guess <script>alert(1)</script>", config=RetryConfig(n_samples=2), api_kwargs={"n": 2}
    )
    airetry(lambda c: last_output(c).islower(), run(call), "Use lowercase & nothing else.")
    return airetry(lambda c: last_output(c).startswith("y"), call, 'It starts with "y"')


def test_rows_follow_the_tree() -> None:
    call = game()
    outline = Outline(samples_html(call.samples, title="A & <B>", active_id=call.active_sample_id))
    rows = outline.with_class("node")
    nodes = list(pre_order(call.samples))
    assert [row["data-id"] for row in rows] == [str(node.id) for node in nodes]
    assert [row.get("data-parent") for row in rows] == [node.parent and str(node.parent.id) for node in nodes]
    assert len(outline.with_class("fold")) == sum(bool(node.children) for node in nodes)
    (active,) = outline.with_class("active")
    assert active["data-id"] == str(call.active_sample_id)
    assert "A & <B>" in outline.texts


def test_it_is_self_contained() -> None:
    page = samples_html(game().samples)
    outline = Outline(page)
    assert not [tag for tag, attrs in outline.elements if tag in ("link", "iframe", "object")]
    assert not [attrs for _, attrs in outline.elements if "src" in attrs or "href" in attrs]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_everything_is_escaped() -> None:
    root = SampleNode(
        [UserMessage("</pre><script>bad()</script>%%rows%%"), AIMessage("<img src=x onerror=bad()>")]
    )
    root.feedback = "\n<script>bad()</script>"
    outline = Outline(samples_html(root, title="%%rows%%</title>"))
    assert [tag for tag, _ in outline.elements].count("script") == 1
    assert not [attrs for tag, attrs in outline.elements if tag == "img"]
    assert len(outline.with_class("node")) == 1


def test_other_data_and_subtrees() -> None:
    root = SampleNode({"x": "<1>"})
    child = expand(
        root, [DataMessage([1.5]), UserMessage("u", images=("data:image/png;base64,AA", "http://h/x"))]
    )
    below = expand(child, ["not a message"])
    outline = Outline(samples_html(child))
    assert [row["data-id"] for row in outline.with_class("node")] == [str(child.id), str(below.id)]
    assert outline.with_class("node")[0].get("data-parent") is None
    assert [attrs["src"] for tag, attrs in outline.elements if tag == "img"] == ["data:image/png;base64,AA"]
    assert "http://h/x" in outline.texts
    assert "{'x': '<1>'}" in Outline(samples_html(root)).texts


def test_a_deep_chain() -> None:
    root = node = SampleNode([])
    for number in range(9_999):
        node = expand(node, [AIMessage(str(number))], success=False)
    page = samples_html(root)
    rows = Outline(page).with_class("node")
    assert len(rows) == 10_000
    assert rows[-1]["data-depth"] == "9999"
    assert len(page) < 20_000_000


# In a browser

PROBE = """
<script>
const rows = [...document.querySelectorAll(".node")];
const result = document.createElement("pre");
result.id = "probe";
const visible = () => rows.filter((row) => row.checkVisibility()).map((row) => row.dataset.id).join(",");
const texts = (row) => [...row.querySelectorAll(".message pre")].map((p) => p.textContent).join("|");
const lines = [];
lines.push("start=" + visible());
rows[1].querySelector(".fold").click();
lines.push("folded=" + visible());
rows[1].querySelector(".fold").click();
lines.push("unfolded=" + visible());
document.getElementById("fold-all").click();
lines.push("foldall=" + visible());
document.getElementById("unfold-all").click();
const leaf = rows[4];
lines.push("closed=" + leaf.querySelector(".messages").checkVisibility());
document.getElementById("open-all").click();
lines.push("open=" + leaf.querySelector(".messages").checkVisibility());
leaf.querySelector(".earlier").click();
lines.push("conversation=" + texts(leaf));
document.getElementById("close-all").click();
lines.push("closedagain=" + leaf.querySelector(".messages").checkVisibility());
const style = getComputedStyle(document.body);
lines.push("colours=" + style.color + " on " + style.backgroundColor);
lines.push("overflow=" + (document.documentElement.scrollWidth > window.innerWidth));
lines.push("requests=" + performance.getEntriesByType("resource").length);
result.textContent = lines.join("\\n");
document.body.append(result);
</script>
"""


def rendered(page: str, folder: Path, *options: str) -> str:
    """The DOM after a browser has loaded the page."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [str(CHROMIUM), *CHROMIUM_OPTIONS, *options, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def probed(call: AICall, folder: Path, *options: str) -> dict[str, str]:
    page = samples_html(call.samples, active_id=call.active_sample_id).replace("</body>", PROBE + "</body>")
    dom = rendered(page, folder, *options)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    text = html.unescape(found.group(1))
    return {
        name: value for name, _, value in re.findall(r"^(\w+)(=)(.*(?:\n(?!\w+=).*)*)", text, re.MULTILINE)
    }


@needs_browser
def test_folding_and_conversations_in_a_browser(tmp_path: Path) -> None:
    call = game()
    nodes = list(pre_order(call.samples))
    every = ",".join(str(node.id) for node in nodes)
    seen = probed(call, tmp_path, "--window-size=1000,900")
    assert seen["start"] == seen["unfolded"] == every
    below = {node.id for node in pre_order(nodes[1])} - {nodes[1].id}
    assert seen["folded"] == ",".join(str(node.id) for node in nodes if node.id not in below)
    assert seen["foldall"] == str(nodes[0].id)
    assert seen["closed"] == seen["closedagain"] == "false"
    assert seen["open"] == "true"
    # The shared messages come from the ancestors' rows.
    assert seen["conversation"] == "|".join(message.content for message in nodes[4].data)
    assert len(nodes[4].data) == 7
    assert seen["requests"] == "0"
    assert seen["overflow"] == "false"


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_browser
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_light_and_dark_in_a_browser(tmp_path: Path, scheme: int, dark: bool) -> None:
    seen = probed(game(), tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    text, back = (luminance(colour) for colour in seen["colours"].split(" on "))
    assert (back < text) is dark
    light, shade = max(text, back), min(text, back)
    assert (light + 0.05) / (shade + 0.05) > 7


@needs_browser
def test_a_deep_chain_in_a_browser(tmp_path: Path) -> None:
    root = node = SampleNode([])
    for number in range(999):
        node = expand(node, [AIMessage(str(number))], success=False)
    probe = "<script>document.title = document.querySelectorAll('li.node').length + ' rows'</script>"
    dom = rendered(samples_html(root).replace("</body>", probe + "</body>"), tmp_path)
    assert "<title>1000 rows</title>" in dom
