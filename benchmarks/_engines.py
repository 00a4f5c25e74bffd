"""Engines and servers to measure: the embedded model on vLLM, with the plugin and without."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aici_vllm

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

ARGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 8192, "seed": 0}


@contextmanager
def engine(plugin: bool, **args: Any) -> Iterator[Any]:
    """An in-process `vllm.LLM`, whose engine core has a process of its own."""
    from vllm import LLM

    extra = aici_vllm.engine_args() if plugin else {}
    llm = LLM(str(aici_vllm.embedded_model()), **{**ARGS, "disable_log_stats": False, **extra, **args})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@contextmanager
def server(*options: str, **variables: str) -> Iterator[str]:
    """The URL of a server with the plugin.

    Args:
        options: of `vllm serve`.
        variables: of its environment.
    """
    from demo import wait_until_ready

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "aici_vllm.cli", "serve", "embedded", "--served-model-name", "embedded"]
    fixed = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"]
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"aici-benchmark-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *fixed, *options],
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
