"""The range of vLLM versions, and the internals that the engine leans on, each by name."""

import inspect

import pytest
from packaging.version import Version

from aici_vllm.engine import compat

INSIDE = ["0.32.0", "0.32.1.post2", "0.33.0", "0.33.4+cpu"]
OUTSIDE = ["0.31.9", "0.34.0", "1.0"]


@pytest.mark.parametrize("version", INSIDE)
def test_versions_inside_the_range(version: str) -> None:
    assert compat.is_supported(Version(version))


@pytest.mark.parametrize("version", OUTSIDE)
def test_versions_outside_are_refused_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compat.is_supported(Version(version))
    monkeypatch.setattr(compat, "installed_version", lambda: Version(version))
    with pytest.raises(compat.UnsupportedVLLM, match=rf">=0.32,<0.34, and {version}"):
        compat.require_supported()


LEANED_ON = {
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": [
        "add_request",
        "finish_requests",
        "get_num_unfinished_requests",
        "reset_prefix_cache",
        "shutdown",
        "schedule",
        "get_grammar_bitmask",
        "update_from_output",
        "pause_state",
        "_update_after_schedule",
        "_update_request_with_output",
        "_enqueue_waiting_request",
        "_free_request",
    ],
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ["allocate_slots", "cache_blocks", "free"],
    "vllm.v1.core.block_pool:BlockPool": [
        "free_blocks",
        "get_new_blocks",
        "get_num_free_blocks",
        "is_block_writable",
        "touch",
    ],
    "vllm.v1.core.sched.request_queue:RequestQueue": ["prepend_request", "remove_requests"],
    "vllm.v1.engine.input_processor:InputProcessor": ["process_inputs"],
    "vllm.v1.request:Request": [
        "append_output_token_ids",
        "take_events",
        "take_prefill_stats",
        "update_block_hashes",
    ],
}

ATTRIBUTES = {
    "vllm.v1.request:Request.__init__": [
        "_all_token_ids",
        "_block_hasher",
        "_output_token_ids",
        "block_hashes",
        "drop_stale_output",
        "is_prefill_chunk",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_output_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_stale_output_tokens",
        "spec_token_ids",
    ],
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": [
        "_inflight_prefills",
        "deferred_waiting",
        "hash_block_size",
        "kv_cache_manager",
        "kv_holding_waiting",
        "max_model_len",
        "max_num_running_reqs",
        "requests",
        "running",
        "use_v2_model_runner",
        "waiting",
    ],
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.__init__": [
        "_pending_cow_copies",
        "block_pool",
        "block_size",
        "num_cached_block",
        "req_to_blocks",
    ],
}


def _find(path: str) -> object:
    module, _, names = path.partition(":")
    found: object = __import__(module, fromlist=["_"])
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, names in LEANED_ON.items() for n in names])
def test_vllm_still_has(owner: str, name: str) -> None:
    assert hasattr(_find(owner), name)


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, names in ATTRIBUTES.items() for n in names])
def test_vllm_still_sets(owner: str, name: str) -> None:
    assert f"self.{name}" in inspect.getsource(_find(owner))  # type: ignore[arg-type]
