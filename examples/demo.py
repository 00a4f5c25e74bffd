"""`make demo`: serve the embedded model with the plugin, run the README's script, show what came of it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI
from rich.console import Console
from rich.text import Text

SCRIPT = Path(__file__).parent / "scripts" / "tour.py"
START_SECONDS = 300
STYLES = {"spliced": "cyan", "sampled": "bold yellow"}


def main() -> int:
    console = Console()
    console.rule("the script")
    console.print(Text(SCRIPT.read_text()))
    with server(console) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        answer = client.completions.create(
            model="embedded",
            prompt="",
            max_tokens=200,
            temperature=0.0,
            extra_body={"vllm_xargs": {"controller": SCRIPT.read_text()}},
        )
    found = answer.kv_transfer_params["controller"]
    show(console, found)
    return int(any(branch["error"] for branch in found["branches"]))


@contextmanager
def server(console: Console) -> Iterator[str]:
    """A server on a free port; it is stopped on the way out, whatever happened."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "aici_vllm.cli", "serve", "embedded", "--served-model-name", "embedded"]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"aici-demo-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command + options,
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with console.status(f"starting vllm serve (log: {log})"):
            wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Return when the server answers.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}; its log is {log}")
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s; its log is {log}")


def show(console: Console, found: dict) -> None:
    """Text with spliced and sampled parts told apart, then branches, variables and cost."""
    key = Text("\n").append("spliced", STYLES["spliced"]).append(" and ").append("sampled", STYLES["sampled"])
    console.print(key)
    for branch in found["branches"]:
        console.rule(f"branch {branch['index']}: {branch['finish_reason']}")
        text = Text()
        for part in branch["parts"]:
            text.append(part["text"], STYLES[part["source"]])
        console.print(text)
    console.rule("variables")
    console.print_json(json.dumps(found["variables"]))
    usage = found["usage"]
    console.rule("cost")
    console.print(
        f"{usage['sampled_tokens']} tokens sampled and {usage['spliced_tokens']} spliced, "
        f"in {usage['forward_passes']} forward passes"
    )


if __name__ == "__main__":
    sys.exit(main())
