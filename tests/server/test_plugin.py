"""What the endpoint plugin does before the server answers anybody."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State

from aici_vllm.engine import admission
from aici_vllm.server import plugin
from aici_vllm.server.plugin import ControllerEndpoints


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The models whose vocabulary was read."""
    models: list[Any] = []

    def read_vocabulary(model_config: Any) -> Any:
        models.append(model_config)
        return SimpleNamespace(detokenize=bytes)

    monkeypatch.setattr(plugin, "read_vocabulary", read_vocabulary)
    monkeypatch.setattr(plugin.compat, "check_openai_requests_with", lambda *functions: None)
    monkeypatch.setattr(plugin.compat, "keep_merged_lists", lambda key: None)
    yield models
    admission.resolve_names_with(lambda name: None)


def start(settings: Any, scheduler: str = "aici_vllm.Scheduler") -> State:
    model = SimpleNamespace(max_model_len=100)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler), additional_config={"aici": settings}
    )
    engine: Any = SimpleNamespace(vllm_config=config, model_config=model)
    state = State()
    asyncio.run(ControllerEndpoints().init_state(engine, state, Namespace(api_key=None)))
    return state


def test_the_vocabulary_is_there_before_the_first_request(read: list[Any], tmp_path: Path) -> None:
    state = start({"server": {"store": str(tmp_path)}})
    assert len(read) == 1
    assert state.aici.front.token_bytes(65) == b"A" and len(read) == 1


def test_a_server_that_runs_no_controllers_reads_none(read: list[Any], tmp_path: Path) -> None:
    start({"server": {"store": str(tmp_path)}}, scheduler="vllm.v1.core.sched.scheduler.Scheduler")
    assert read == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "must be a mapping"),
        ({"sever": {}}, "unknown setting aici.sever"),
        ({"server": {"stor": "x"}}, "unknown setting 'stor'"),
        ({"limits": {"branch": 1}}, "unknown limit 'branch'"),
    ],
)
def test_an_operators_typo_stops_the_start(read: list[Any], settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(settings)
