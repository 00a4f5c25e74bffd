"""Names that a request brings: what is stored becomes its text before the engine hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.engine import admission

SCRIPT = "import aici\nasync def main():\n    await aici.FixedTokens('Hello')\naici.start(main())\n"
HASH = "0123456789abcdef" * 4


def resolve(name: str) -> str | None:
    known = {"tag": SCRIPT, "user.tag-1": SCRIPT, HASH: SCRIPT, "broken": "def f(:\n", "installed": None}
    if name not in known:
        raise BadRequestError(f"unknown controller {name!r}")
    return known[name]


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    admission.resolve_names_with(resolve)
    monkeypatch.setattr(admission, "load_installed", {"installed": object()}.__getitem__)
    yield
    admission.resolve_names_with(lambda name: None)


def config() -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls="aici_vllm.Scheduler"),
        additional_config={},
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        model_config=SimpleNamespace(is_diffusion=False, is_encoder_decoder=False, max_model_len=100),
    )


def admit(**extra_args: Any) -> dict[str, Any]:
    """What the engine is told of a request; the caller's own parameters stay as they are."""
    params = SamplingParams(extra_args=dict(extra_args))
    _, made = admission.admit(config(), {"prompt_token_ids": [1]}, params)
    assert params.extra_args == extra_args
    told: dict[str, Any] = made.extra_args
    return told


def admitted(controller: str) -> str:
    return str(admit(controller=controller)["controller"])


@pytest.mark.parametrize("name", ["tag", "user.tag-1", HASH])
def test_stored_names_become_the_text(name: str) -> None:
    assert admitted(name) == SCRIPT


def test_an_installed_name_stays_a_name() -> None:
    assert admitted("installed") == "installed"


def test_what_was_stored_under_other_limits_is_checked_again() -> None:
    with pytest.raises(BadRequestError, match="line 1"):
        admitted("broken")


@pytest.mark.parametrize("name", ["unknown", "f" * 64])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(BadRequestError, match="unknown controller"):
        admitted(name)


def test_source_is_never_looked_up() -> None:
    assert admitted(SCRIPT) == SCRIPT
