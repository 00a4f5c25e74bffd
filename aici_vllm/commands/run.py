"""`aici run script.py`: send a script to a server, show its text as it comes, then what it says."""

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


class RunError(Exception):
    """The server could not be reached or refused the request; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, help="a controller script; - for standard input")
    parser.add_argument("-p", "--prompt", default="", help="text before the script's own")
    parser.add_argument("-a", "--arg", default="", help="a string for the script (controller_arg)")
    parser.add_argument("-t", "--max-tokens", type=int, default=512, help="tokens a branch may get (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--model", help="the server's first model by default")
    parser.add_argument(
        "--base-url",
        default=os.environ.get("AICI_API_BASE", DEFAULT_BASE_URL),
        help=f"the server's OpenAI-compatible root ($AICI_API_BASE, or {DEFAULT_BASE_URL})",
    )
    parser.add_argument("--json", action="store_true", help="print only the results, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 when every branch ended well, 1 when one failed or the server refused."""
    script = sys.stdin.read() if str(arguments.script) == "-" else arguments.script.read_text()
    try:
        found = stream(arguments, script)
    except (RunError, httpx.HTTPError) as error:
        print(f"aici run: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return int(any(branch["error"] for branch in found["branches"]))


def stream(arguments: argparse.Namespace, script: str) -> dict[str, Any]:
    """Run the script, printing the first branch's text as it comes; returns the controller's results.

    Raises:
        RunError: the server answered with an error, or without results.
    """
    with httpx.Client(base_url=arguments.base_url.rstrip("/") + "/", timeout=None) as client:
        body = {
            "model": arguments.model or first_model(client),
            "prompt": arguments.prompt,
            "max_tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
            "stream": True,
            "vllm_xargs": {"controller": script, "controller_arg": arguments.arg},
        }
        found = None
        for chunk in events(client, body):
            if "error" in chunk:
                raise RunError(chunk["error"].get("message", chunk["error"]))
            for choice in chunk["choices"]:
                if not arguments.json:
                    print(choice["text"], end="", flush=True)
                if choice.get("finish_reason"):
                    found = json.loads(choice["stop_reason"])["controller"]
    if found is None:
        raise RunError("the server ended the stream without results; does it run the plugin?")
    return found


def first_model(client: httpx.Client) -> str:
    """The name of the model that the server lists first."""
    response = client.get("models")
    response.raise_for_status()
    name: str = response.json()["data"][0]["id"]
    return name


def events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed completion.

    Raises:
        RunError: the server refused the request.
    """
    with client.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise RunError(refusal(response))
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[len("data: ") :])


def refusal(response: httpx.Response) -> str:
    """What the server said, without its wrapping where it has one."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text}"


def show(found: dict[str, Any]) -> None:
    """Branches with their logs, then usage and variables, in plain lines."""
    print()
    for branch in found["branches"]:
        error = f": {branch['error']}" if branch["error"] else ""
        print(f"--- branch {branch['index']} ({branch['finish_reason']}{error})")
        if branch["index"]:
            print(branch["text"])
        for line in branch["logs"].splitlines():
            print(f"[{branch['index']}] {line}")
    usage = found["usage"]
    print(
        f"--- {usage['sampled_tokens']} tokens sampled, {usage['spliced_tokens']} spliced, "
        f"{usage['forward_passes']} forward passes"
    )
    binaries = {name: base64.b64decode(text) for name, text in found["variables_base64"].items()}
    variables = {**found["variables"], **{n: b.decode(errors="replace") for n, b in binaries.items()}}
    for name, value in sorted(variables.items()):
        print(f"{name} = {value}")
