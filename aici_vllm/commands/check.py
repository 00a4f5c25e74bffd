"""`aici check script.py`: what the sandbox would refuse, line by line, without a server."""

import argparse
import sys
from pathlib import Path

from aici_vllm.controller.check import all_errors
from aici_vllm.controller.limits import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, nargs="+", help="controller scripts")


def run(arguments: argparse.Namespace) -> int:
    """0 when the sandbox takes every script; each reason why it does not is a line on standard output."""
    failed = False
    for path in arguments.script:
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            print(f"aici check: {path}: {error}", file=sys.stderr)
            failed = True
            continue
        for found in all_errors(source, Limits()):
            line = "" if found.line is None else f"{found.line}:"
            print(f"{path}:{line} {str(found).removeprefix(f'line {found.line}: ')}")
            failed = True
    return int(failed)
