"""`aici serve MODEL …`: `vllm serve` with the flags and the plugin that let it run controllers."""

import argparse
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

FLAGS = ("--scheduler-cls", "aici_vllm.Scheduler", "--worker-cls", "aici_vllm.Worker")

EMBEDDED_CACHE_GIB = "1"
"""KV cache of the embedded model on a CPU, unless the operator sets another."""

PLUGIN = "aici"
ALLOWED = "VLLM_PLUGINS"

LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
"""Groups of which vLLM loads everything while `VLLM_PLUGINS` is unset."""

ONLY_BY_NAME = frozenset(["lora_hf_hub_resolver"])
"""vLLM's own plugin that downloads: it does nothing unless the operator names it."""


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
        # vLLM's CPU build wants nine tenths of all memory, and does not start where others use the rest.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", EMBEDDED_CACHE_GIB)
    os.environ[ALLOWED] = allowed_plugins(os.environ.get(ALLOWED))
    vllm_command_line(["serve", model, *arguments.vllm_arguments, *FLAGS])
    return 0


def allowed_plugins(set_by_operator: str | None) -> str:
    """`VLLM_PLUGINS` with our name in it, and all else as it would have been.

    vLLM adds routes only for plugins that this variable names. But once it is set, nothing else loads
    that it does not name, so what loads while it is unset is named too.
    """
    if set_by_operator is None:
        names = [entry.name for group in LOADED_BY_DEFAULT for entry in entry_points(group=group)]
    else:
        names = set_by_operator.split(",")
    return ",".join(_with_ours(name for name in names if set_by_operator or name not in ONLY_BY_NAME))


def _with_ours(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*filter(None, names), PLUGIN]))
