"""The call tree as a page, read back by a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from aici_vllm.recursive import CallNode, Reply, Usage, tree_page, write_tree_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def sample():
    root = CallNode("run", 0, EVIL, iterations=2)
    root.count(Reply("r", Usage(1500, 1400, 80)))
    child = root.child("run", 1, "first child", "big-model")
    child.child("query", 1, "grandchild question").finish("grandchild result")
    child.finish(error="the child broke")
    for number in range(250):
        root.child("query", 0, f"question {number}").finish(f"result {number}")
    root.finish(EVIL)
    return root


def test_the_page_stands_alone_and_holds_the_data():
    page = tree_page(sample(), title="A <title>")
    assert "<title>A &lt;title&gt;</title>" in page
    assert not re.search(r"https?://|src=\"|href=|@import|url\(", page.split("<script type")[0])
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1)
    )
    assert data["root"]["prompt"] == EVIL and len(data["root"]["children"]) == 251
    assert data["totals"]["nodes"] == 253


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed; the page cannot be checked in a browser"
)
def test_a_browser_shows_the_tree(tmp_path):
    page = write_tree_page(sample(), tmp_path / "tree.html", title="Call tree")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert 'data-ready="yes"' in dom and "<title>Call tree</title>" in dom
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.S)
    text = html.unescape(re.sub(r"<[^>]+>", "\n", body))
    for expected in (
        "1500 (1400) + 80",
        "first child",
        "the child broke",
        "grandchild result",
        "run · 2 turns",
    ):
        assert expected in text
    assert "question 98" in text and "question 99" not in text and "show 100 of 151 more" in text
    assert EVIL[:80] in text and "<img" not in body
    assert text.split("nodes")[0].strip().endswith("253")
