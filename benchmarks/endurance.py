"""Ten thousand controlled requests on one engine, a thousand at a time: what it holds before and after.

Prints, after every tenth of them, the requests a second, the memory of the engine's core and of its other
processes, their open files, and their number. At the end every KV block must be free and every script must
have ended as it should.

    python benchmarks/endurance.py [--model FOLDER] [--requests 10000] [--at-once 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import aici

async def main():
    await aici.FixedTokens("Number " + aici.controller_arg())
    start = aici.Label()
    await aici.gen_tokens(max_tokens=3)
    await aici.FixedTokens(" again", following=start)
    branch = await aici.fork(2)
    if branch == 0:
        (found,) = await aici.wait_vars("found")
        aici.set_var("echo", found)
    else:
        await aici.gen_tokens(regex="[a-z]{2}", store_var="found")

aici.start(main)
"""
SANDBOX = "monty"
CORE = "VLLM::EngineCor"
"""How the system names the core's process: 15 characters at most."""


@dataclass
class State:
    """What the engine holds after so many requests.

    Attributes:
        core: resident bytes of the engine's core, where scripts, branches and masks are.
        memory: those of its other processes, those of the sandbox aside.
        files: their open files, less those that lead to the sandbox's.
        processes, sandboxes: how many there are.
    """

    requests: int
    seconds: float
    core: int
    memory: int
    files: int
    processes: int
    sandboxes: int


def state(requests: int, seconds: float) -> State:
    """Of this process's descendants now."""
    engine, sandboxes, core, memory, files = 0, 0, 0, 0, 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() == SANDBOX:
                sandboxes += 1
                continue
            resident = process.memory_info().rss
            if CORE in process.name():
                core += resident
            else:
                memory += resident
            files += process.num_fds()
            engine += 1
        except psutil.NoSuchProcess:
            continue
    return State(requests, seconds, core, memory, files, engine, sandboxes)


async def measure(arguments: argparse.Namespace, console: Console) -> tuple[list[State], int, bool]:
    """States along the way, how many requests ended wrong, and whether every block is free at the end."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import aici_vllm

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(arguments.model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            disable_log_stats=True,
            **aici_vllm.engine_args(),
        )
    )
    wrong = 0
    at_once = asyncio.Semaphore(arguments.at_once)

    async def one(number: int) -> None:
        nonlocal wrong
        async with at_once:
            wrong += not await _ends_well(engine, str(number))

    states: list[State] = []
    try:
        tenth = max(1, arguments.requests // 10)
        started = time.perf_counter()
        for done in range(0, arguments.requests, tenth):
            await asyncio.gather(*(one(number) for number in range(done, done + tenth)))
            states.append(state(done + tenth, time.perf_counter() - started))
            console.print(states[-1])
        free = await engine.reset_prefix_cache()
    finally:
        engine.shutdown()
    return states, wrong, bool(free)


async def _ends_well(engine: Any, name: str) -> bool:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    import aici_vllm

    params = aici_vllm.request_params(
        SCRIPT,
        name,
        SamplingParams(max_tokens=60, temperature=0, output_kind=RequestOutputKind.FINAL_ONLY),
    )
    async for output in engine.generate("Count", params, name):
        last = output
    result = last.kv_transfer_params["controller"]
    variables = result["variables"]
    errors = [branch["error"] for branch in result["branches"]]
    return errors == [None, None] and len(variables["found"]) == 2 and variables["echo"] == variables["found"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a model's folder; a tiny random one is made if there is none"
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.path.insert(0, str(ROOT))
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from tests.engine.random_model import random_model

            arguments.model = random_model(Path(folder))
        states, wrong, free = asyncio.run(measure(arguments, console))
    table = Table(title=f"{arguments.requests} controlled requests, {arguments.at_once} at a time")
    held = ("core MiB", "others MiB", "open files", "processes", "sandbox processes")
    for column in ("requests", "requests/s", *held):
        table.add_column(column, justify="right")
    before = State(0, 0.0, 0, 0, 0, 0, 0)
    for now in states:
        rate = (now.requests - before.requests) / (now.seconds - before.seconds)
        memory = (f"{now.core / 2**20:.0f}", f"{now.memory / 2**20:.0f}")
        cells = (now.requests, f"{rate:.0f}", *memory, now.files)
        table.add_row(*map(str, (*cells, now.processes, now.sandboxes)))
        before = now
    console.print(table)
    console.print(f"ended wrong: {wrong}; every KV block free at the end: {'yes' if free else 'NO'}")
    if arguments.json:
        found = {"states": [asdict(each) for each in states], "wrong": wrong, "blocks_free": free}
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0 if free and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
