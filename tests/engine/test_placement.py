"""Which of several data-parallel engines a request goes to, where that must not be left to chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.engine.admission import choose_engine


def placed(
    engines: int, extra: dict[str, Any] | None, name: str = "r", rank: int | None = None, **more: Any
) -> Any:
    """The engine that a request is given, None for any."""
    parallel = SimpleNamespace(
        data_parallel_size=engines, data_parallel_size_local=1, local_engines_only=more.pop("local", False)
    )
    params = SamplingParams(extra_args=extra, **more)
    request = SimpleNamespace(request_id=name, sampling_params=params, data_parallel_rank=rank)
    choose_engine(SimpleNamespace(parallel_config=parallel), request)  # type: ignore[arg-type]
    return request.data_parallel_rank


def test_choices_get_one_engine_and_requests_differ() -> None:
    ranks = [placed(4, {"controller": "x"}, f"cmpl-{i}", n=3) for i in range(64)]
    assert set(ranks) == {0, 1, 2, 3}
    assert placed(4, {"controller": "x"}, "cmpl-7", n=3) == ranks[7]


def test_whoever_needs_no_engine_of_its_own_is_left_alone() -> None:
    assert placed(4, {"controller": "x"}) is None
    assert placed(4, None, n=3) is None
    assert placed(4, {"controller": "x"}, rank=2, n=3) == 2
    assert placed(1, {"controller": "x", "controller_checkpoint": "a"}, n=3) is None
    assert placed(4, {"controller": "x", "controller_checkpoint": "a"}, local=True) is None


@pytest.mark.parametrize("key", ["controller_checkpoint", "controller_from", "controller_drop"])
def test_a_checkpoint_needs_its_engine_named(key: str) -> None:
    extra = {"controller": "x", key: "a"}
    assert placed(2, extra, rank=0) == 0
    with pytest.raises(BadRequestError, match="with the header X-data-parallel-rank: 0 to 1"):
        placed(2, extra)
