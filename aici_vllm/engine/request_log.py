"""One line of JSON for every controlled request that is over, on the logger `aici_vllm`.

{"event": "controller_finished", "id": "cmpl-…", "seconds": 0.41, "branches": 2, …}
"""

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from typing import Any

from vllm import envs
from vllm.config import LoggingConfig

from aici_vllm.engine.admission import is_name
from aici_vllm.engine.controlled import ControlledGroup
from aici_vllm.engine.results import usage

LOGGER = "aici_vllm"
EVENT = "controller_finished"

logger = logging.getLogger(LOGGER)


def show_request_log(config: LoggingConfig) -> None:
    """Have the lines written to where vLLM's own log goes, unless somebody configured logging.

    A line stands alone, so that a program can read it.
    """
    if not config.configure_logging or config.pylogging_config_file or logger.hasHandlers():
        return
    stream = sys.stderr if envs.VLLM_LOGGING_STREAM.endswith("stderr") else sys.stdout
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(config.log_level)
    logger.propagate = False


def log_request(summary: dict[str, Any]) -> None:
    """Write the line of a request that is over."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(json.dumps({"event": EVENT, **summary}))


def summary(group: ControlledGroup) -> dict[str, Any]:
    """What is worth knowing of a request that is over; nothing of what it said."""
    branches = group.group.branches
    request = group.root.request
    return {
        "id": group.root_id,
        "controller": controller_name(group.controller),
        "arrived": request.arrival_time,
        "seconds": round(time.time() - request.arrival_time, 6),
        "branches": len(branches),
        "finish_reasons": dict(Counter(branch.finish_reason for branch in branches)),
        "errors": sum(branch.error is not None for branch in branches),
        "script_seconds": round(script_seconds(group), 6),
        "prompt_tokens": group.group.root.initial_prompt_len,
        "usage": usage(list(group.members.values())),
    }


def script_seconds(group: ControlledGroup) -> float:
    """How long the scripts of all branches computed."""
    return sum(b.program.seconds for b in group.group.branches if b.program is not None)


def controller_name(controller: str | bytes) -> str:
    """An installed name as it is; source and functions by their SHA-256."""
    if isinstance(controller, str) and is_name(controller):
        return controller
    data = controller.encode(errors="surrogatepass") if isinstance(controller, str) else controller
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
