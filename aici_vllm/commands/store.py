"""`aici upload` and `aici tags`: scripts that a server keeps, and their names."""

import argparse
import time
from pathlib import Path
from typing import Any

from aici_vllm.client import Client
from aici_vllm.commands import connection


def add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, help="a controller script")
    parser.add_argument("-T", "--tag", action="append", default=[], help="name it; may be given again")
    connection.add_arguments(parser)


def upload(arguments: argparse.Namespace) -> int:
    """Print the script's hash, and its tags if it got any."""

    def work(client: Client) -> int:
        module_id = client.upload_module(arguments.script)["module_id"]
        print(module_id)
        if arguments.tag:
            for tag in client.tag_module(module_id, arguments.tag):
                print(tag_line(tag))
        return 0

    return connection.with_client(arguments, "upload", work)


def add_tags_arguments(parser: argparse.ArgumentParser) -> None:
    connection.add_arguments(parser)


def tags(arguments: argparse.Namespace) -> int:
    """Print every tag, the one that moved last first."""

    def work(client: Client) -> int:
        for tag in client.list_tags():
            print(tag_line(tag))
        return 0

    return connection.with_client(arguments, "tags", work)


def tag_line(tag: dict[str, Any]) -> str:
    """A tag in one line: name, start of the hash, when it moved, who moved it, size."""
    moved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(tag["updated_at"]))
    return f"{tag['tag']:<24} {tag['module_id'][:12]}  {moved}  {tag['updated_by']}  {tag['wasm_size']} bytes"
