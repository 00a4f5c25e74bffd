"""`aici run script.py`: send a script to a server, show every branch as it grows, then what came of it."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aici_vllm.client import Client, RunRecord, ServerError
from aici_vllm.commands import connection
from aici_vllm.commands.views import LivePicture, PlainLines, Silent, View


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", help="a controller script; - for standard input; or a tag, hash or name")
    parser.add_argument("-p", "--prompt", default="", help="text before the script's own")
    parser.add_argument("-a", "--arg", default="", help="a string for the script (controller_arg)")
    parser.add_argument("-t", "--max-tokens", type=int, default=512, help="tokens a branch may get (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--model", help="the server's first model by default")
    connection.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print only the results, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 when every branch ended well, 1 when one failed or the server refused."""
    return connection.with_client(arguments, "run", lambda client: _run(client, arguments))


def _run(client: Client, arguments: argparse.Namespace) -> int:
    request = {
        "controller": read_controller(arguments.script),
        "controller_arg": arguments.arg,
        "prompt": arguments.prompt,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "model": arguments.model,
    }
    record = RunRecord(request)
    with _events(client, request) as events, _view(arguments.json) as view:
        for event in events:
            record.add(event)
            view.show(event)
    found = record.finish()
    view.end(found["results"])
    if arguments.json:
        print(json.dumps(found["results"], indent=2))
    return int(found["error"] is not None)


def read_controller(script: str) -> str:
    """What `script` names: a file's text, standard input, or a controller that the server knows."""
    if script == "-":
        return sys.stdin.read()
    path = Path(script)
    return path.read_text() if path.suffix == ".py" or path.exists() else script


@contextmanager
def _view(silent: bool) -> Iterator[View]:
    if silent:
        yield Silent()
    elif not sys.stdout.isatty():
        yield PlainLines(sys.stdout)
    else:
        from rich.console import Console

        picture = LivePicture(Console())
        with picture:
            yield picture


@contextmanager
def _events(client: Client, request: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """The run's events; a server without our routes is asked for a completion."""
    try:
        with client.stream(**request) as events:
            yield events
    except ServerError as error:
        if error.status != HTTPStatus.NOT_FOUND or error.message != HTTPStatus.NOT_FOUND.phrase:
            raise
        yield _completion_events(client, request)


def _completion_events(client: Client, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same from `/v1/completions`, which tells of the first branch only until all is over.

    Raises:
        ServerError: the server refused the request, or answered without results.
    """
    body = {
        "model": request["model"] or client.first_model(),
        "prompt": request["prompt"],
        "max_tokens": request["max_tokens"],
        "temperature": request["temperature"],
        "stream": True,
        "vllm_xargs": {name: request[name] for name in ("controller", "controller_arg")},
    }
    found = None
    for chunk in client.completion(body):
        if "error" in chunk:
            raise ServerError("run", chunk["error"].get("code", 500), chunk["error"]["message"])
        for choice in chunk["choices"]:
            yield _event(0, choice["text"])
            found = _results(choice.get("stop_reason")) or found
    if found is None:
        raise ServerError("run", 500, "the stream ended without results: does the server run the plugin?")
    for branch in found["branches"]:
        text = branch["text"] if branch["index"] else ""
        fork = {name: branch[name] for name in ("finish_reason", "error", "logs")}
        yield _event(branch["index"], text, **fork)
    yield {"object": "run", "forks": [], "usage": found["usage"], "results": found}


def _results(stop_reason: Any) -> dict[str, Any] | None:
    """The results of a controller, which come as a stop reason; None where the stop reason is another one."""
    try:
        results: dict[str, Any] = json.loads(stop_reason)["controller"]
    except (TypeError, ValueError, KeyError):
        return None
    return results


def _event(index: int, text: str, **more: Any) -> dict[str, Any]:
    parts = [{"kind": "sampled", "text": text}] if text else []
    return {"object": "run", "forks": [{"index": index, "text": text, "parts": parts, **more}]}
