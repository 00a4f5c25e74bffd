"""`aici serve` names our plugin, and leaves every other one as it would have been."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from aici_vllm.commands import serve

INSTALLED = {
    "vllm.general_plugins": ["aici", "other", "lora_hf_hub_resolver"],
    "vllm.platform_plugins": ["board"],
    "vllm.io_processor_plugins": ["other"],
    "vllm.endpoint_plugins": ["aici", "more_routes"],
}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, "m:f", group) for name in INSTALLED.get(group, [])]

    monkeypatch.setattr(serve, "entry_points", entry_points)


def test_what_loads_by_default_is_named_and_what_must_be_asked_for_is_not() -> None:
    assert serve.allowed_plugins(None) == "aici,other,board"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", "aici"),
        ("other", "other,aici"),
        ("aici,other", "aici,other"),
        ("lora_hf_hub_resolver", "lora_hf_hub_resolver,aici"),
    ],
)
def test_an_operators_list_is_kept(given: str, wanted: str) -> None:
    assert serve.allowed_plugins(given) == wanted
