"""vLLM's general plugin: runs in every process of every vLLM on a machine that has this package."""

from typing import Any

from aici_vllm.engine import compat


def register() -> None:
    """Have requests that carry a controller checked before they run, and controllers counted in `/metrics`.

    Plain requests pass through untouched, and a vLLM that this package does not know is left alone.
    """
    try:
        found = compat.installed_version()
    except compat.UnsupportedVLLM:
        return
    if compat.is_supported(found):
        from aici_vllm.engine.admission import (
            admit,
            checked_arguments,
            choose_engine,
            has_controller,
            is_controlled,
        )

        compat.admit_requests_with(admit, choose_engine)
        compat.check_openai_requests_with(has_controller, checked_arguments)
        compat.leave_stops_to_engine(is_controlled)
        compat.allow_empty_prompts(lambda body: has_controller(body.get("vllm_xargs")))
        compat.record_stats_with(_metrics)


def _metrics(vllm_config: Any, engine_indexes: list[int], beside: Any) -> Any:
    from aici_vllm.engine.admission import runs_controllers

    if not runs_controllers(vllm_config):
        return None
    from aici_vllm.engine.metrics import ControllerMetrics

    return ControllerMetrics(vllm_config, engine_indexes, beside)
