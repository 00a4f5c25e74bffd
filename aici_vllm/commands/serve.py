"""`aici serve MODEL …`: `vllm serve` with the flags that let it run controllers."""

import argparse
import sys

FLAGS = ("--scheduler-cls", "aici_vllm.Scheduler", "--worker-cls", "aici_vllm.Worker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hugging Face name or folder; `embedded` is the embedded model")
    parser.add_argument("vllm_arguments", nargs=argparse.REMAINDER, help="everything else `vllm serve` takes")


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped."""
    from aici_vllm.engine.compat import vllm_command_line
    from aici_vllm.model import ModelError, embedded_model

    model = arguments.model
    if model == "embedded":
        try:
            model = str(embedded_model())
        except ModelError as error:
            print(f"aici serve: {error}", file=sys.stderr)
            return 1
    vllm_command_line(["serve", model, *arguments.vllm_arguments, *FLAGS])
    return 0
