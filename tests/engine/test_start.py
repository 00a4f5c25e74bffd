"""An engine that would run controllers wrongly does not start, and says what to add."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aici_vllm.engine.scheduler import check_start


def config(worker: str = "aici_vllm.Worker") -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))


def test_vllms_own_worker_would_apply_no_masks() -> None:
    with pytest.raises(ValueError, match="add --worker-cls aici_vllm"):
        check_start(config("vllm.v1.worker.gpu_worker.Worker"))


@pytest.mark.parametrize("plugins", ["", "other", "aici_too,other"])
def test_without_its_plugin_nothing_would_be_checked(plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with pytest.raises(ValueError, match="add aici to VLLM_PLUGINS"):
        check_start(config())


def test_vllm_loads_the_plugin_by_itself_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    check_start(config())
    monkeypatch.setenv("VLLM_PLUGINS", "other,aici")
    check_start(config())
