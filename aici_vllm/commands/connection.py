"""Where the server is: arguments that every subcommand which talks to one has."""

import argparse
import os
import sys
from collections.abc import Callable

import httpx

from aici_vllm.client import BASE_URL_VARIABLE, DEFAULT_BASE_URL, Client, ServerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        default=os.environ.get(BASE_URL_VARIABLE, DEFAULT_BASE_URL),
        help=f"the server's OpenAI-compatible root (${BASE_URL_VARIABLE}, or {DEFAULT_BASE_URL})",
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("AICI_API_KEY"), help="one of the server's keys ($AICI_API_KEY)"
    )


def with_client(arguments: argparse.Namespace, name: str, work: Callable[[Client], int]) -> int:
    """`work` with a client; a failure is one line on standard error, and status 1."""
    try:
        with Client(arguments.base_url, arguments.api_key) as client:
            return work(client)
    except ServerError as error:
        print(f"aici {name}: {error.message}", file=sys.stderr)
    except httpx.HTTPError as error:
        print(f"aici {name}: {arguments.base_url}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"aici {name}: {error}", file=sys.stderr)
    return 1
