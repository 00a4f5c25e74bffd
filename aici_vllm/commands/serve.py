"""`aici serve MODEL …`: `vllm serve` with the flags that let it run controllers."""

import argparse
import os
import sys

FLAGS = ("--scheduler-cls", "aici_vllm.Scheduler", "--worker-cls", "aici_vllm.Worker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vllm_arguments", nargs=argparse.REMAINDER, help="everything `vllm serve` takes")
    parser.prefix_chars = "\0"


def command(vllm_arguments: list[str]) -> list[str]:
    """The command that serves: vLLM's own, in this interpreter."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *vllm_arguments, *FLAGS]


def run(arguments: argparse.Namespace) -> int:
    """Become `vllm serve`; returns only if that is impossible."""
    line = command(arguments.vllm_arguments)
    os.execv(line[0], line)
    return 1
