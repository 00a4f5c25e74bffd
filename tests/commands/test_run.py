"""`aici run` against a server that answers from a table: plain lines, JSON, a terminal, an older server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from aici_vllm import client as client_module
from aici_vllm.cli import main
from aici_vllm.commands.views import LivePicture
from tests.test_client import Table, stream

RESULTS = {
    "branches": [{"index": 0, "text": "Hello", "finish_reason": "stop", "error": None, "logs": "log\n"}],
    "variables": {"name": "Ada"},
    "variables_base64": {"raw": "/w=="},
    "usage": {"sampled_tokens": 2, "spliced_tokens": 3, "forward_passes": 2},
}


def event(*parts: tuple[str, str], index: int = 0, **more: Any) -> dict[str, Any]:
    made = [{"kind": kind, "text": text} for kind, text in parts]
    fork = {"index": index, "text": "", "parts": made, "logs": "", "storage": [], "error": ""}
    return {"object": "run", "forks": [{**fork, **more}], "usage": RESULTS["usage"]}


EVENTS = [
    {"id": "run-1", "object": "initial-run", "created": 1, "model": "m"},
    event(("spliced", "Hi\n")),
    event(("sampled", "a")),
    event(("sampled", "b"), index=1),
    event(("sampled", "c"), ("taken_back", "ac"), ("spliced", "d"), logs="said\n"),
    event(index=1, finish_reason="fail", error="ValueError: no"),
    {**event(index=0, finish_reason="aici-stop"), "results": RESULTS},
]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """What the server answers; every client of the command line asks it."""
    answers = Table({"POST /v1/run": stream(EVENTS)})
    transport = httpx.MockTransport(answers)
    original = client_module.httpx.Client

    def make(**more: Any) -> httpx.Client:
        return original(**more, transport=transport)

    monkeypatch.setattr(client_module.httpx, "Client", make)
    yield answers


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "s.py"
    path.write_text("import aici\n")
    return str(path)


def test_plain_lines(table: Table, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", script, "-p", "P", "-a", "A", "-t", "9"]) == 1, "a branch failed"
    assert capsys.readouterr().out.splitlines() == [
        "[0] fixed: 'Hi\\n'",
        "[0] sampled: 'ac'",
        "[0] taken back: 'ac'",
        "[0] fixed: 'd'",
        "[1] sampled: 'b'",
        "--- branch 0 (aici-stop)",
        "Hi",
        "d",
        "[0] said",
        "--- branch 1 (fail: ValueError: no)",
        "b",
        "--- 2 tokens sampled, 3 spliced, 2 forward passes",
        "name = Ada",
        "raw = \ufffd",
    ]
    sent = json.loads(table.asked[0].content)
    assert sent["controller"] == "import aici\n"
    assert (sent["prompt"], sent["controller_arg"], sent["max_tokens"]) == ("P", "A", 9)


def test_json_is_only_the_results(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "some.tag", "--json"])
    assert json.loads(capsys.readouterr().out) == RESULTS
    assert json.loads(table.asked[0].content)["controller"] == "some.tag"


def test_a_terminal_shows_what_was_taken_back_struck_out() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system="truecolor")
    with LivePicture(console) as picture:
        for one in EVENTS:
            picture.show(one)
    picture.end(RESULTS)
    shown = out.getvalue()
    assert "\x1b[2;9;31mac\x1b[0m" in shown, "dim, struck out, red"
    assert "\x1b[36md\x1b[0m" in shown and "\x1b[1;33mb\x1b[0m" in shown
    assert "branch 1: fail: ValueError: no" in shown and "name = Ada" in shown


def test_a_server_without_the_routes_is_asked_for_a_completion(
    table: Table, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = [
        {"choices": [{"text": "Hel"}]},
        {
            "choices": [
                {"text": "lo", "finish_reason": "stop", "stop_reason": json.dumps({"controller": RESULTS})}
            ]
        },
    ]
    table.answers = {
        "POST /v1/run": httpx.Response(404, json={"error": {"message": "Not Found"}}),
        "GET /v1/models": httpx.Response(200, json={"data": [{"id": "m"}]}),
        "POST /v1/completions": stream(chunks),
    }
    assert main(["run", script]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "[0] sampled: 'Hello'",
        "--- branch 0 (stop)",
        "Hello",
        "[0] log",
    ]
    assert json.loads(table.asked[-1].content)["vllm_xargs"]["controller"] == "import aici\n"


WITHOUT_PLUGIN = "aici run: the stream ended without results: does the server run the plugin?\n"


@pytest.mark.parametrize("stop_reason", [None, 151645, "\n", "5", '{"other": 1}'])
def test_a_server_without_the_plugin_is_asked_about(
    table: Table, script: str, capsys: pytest.CaptureFixture[str], stop_reason: Any
) -> None:
    choice = {"text": "Hello", "finish_reason": "length", "stop_reason": stop_reason}
    table.answers = {
        "POST /v1/run": httpx.Response(404, json={"error": {"message": "Not Found"}}),
        "GET /v1/models": httpx.Response(200, json={"data": [{"id": "m"}]}),
        "POST /v1/completions": stream([{"choices": [choice]}, {"choices": []}]),
    }
    assert main(["run", script]) == 1
    assert capsys.readouterr().err == WITHOUT_PLUGIN


def test_a_server_that_names_no_models_is_one_line(
    table: Table, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table.answers = {
        "POST /v1/run": httpx.Response(404, json={"error": {"message": "Not Found"}}),
        "GET /v1/models": httpx.Response(401, json={"error": "Unauthorized"}),
    }
    assert main(["run", script]) == 1
    assert capsys.readouterr().err == "aici run: Unauthorized\n"


def test_a_refusal_is_one_line(table: Table, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    table.answers["POST /v1/run"] = httpx.Response(400, json={"error": {"message": "line 1: no"}})
    assert main(["run", script]) == 1
    assert capsys.readouterr().err == "aici run: line 1: no\n"


def test_a_script_that_is_not_there_is_one_line(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.py"]) == 1
    assert "nowhere.py" in capsys.readouterr().err


def test_upload_and_tags(table: Table, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"tag": "t", "module_id": "ab" * 32, "updated_at": 0, "updated_by": "ann", "wasm_size": 12}
    table.answers = {
        "POST /v1/controllers": httpx.Response(200, json={"module_id": "ab" * 32}),
        "POST /v1/controllers/tags": httpx.Response(200, json={"tags": [row]}),
        "GET /v1/controllers/tags": httpx.Response(200, json={"tags": [row]}),
    }
    assert main(["upload", script, "-T", "t"]) == 0
    uploaded = capsys.readouterr().out.splitlines()
    assert uploaded[0] == "ab" * 32 and uploaded[1].startswith("t ") and uploaded[1].endswith("ann  12 bytes")
    assert main(["tags"]) == 0
    assert capsys.readouterr().out.splitlines() == uploaded[1:]
