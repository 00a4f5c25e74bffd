"""vLLM's general plugin: runs in every process of every vLLM on a machine that has this package."""

from aici_vllm.engine import compat


def register() -> None:
    """Have requests that carry a controller checked before they run.

    Plain requests pass through untouched, and a vLLM that this package does not know is left alone.
    """
    try:
        found = compat.installed_version()
    except compat.UnsupportedVLLM:
        return
    if compat.is_supported(found):
        from aici_vllm.engine.admission import CONTROLLER, admit

        compat.admit_requests_with(admit)
        compat.allow_empty_prompts(lambda body: CONTROLLER in (body.get("vllm_xargs") or {}))
