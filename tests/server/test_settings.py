"""The operator's settings: what there is, and what is refused at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aici_vllm.server.settings import ServerSettings

HASH = "0" * 64


def test_nothing_set_is_an_open_store_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AICI_CACHE", "/somewhere")
    assert ServerSettings.from_config({}) == ServerSettings(store=Path("/somewhere/controllers"))
    monkeypatch.delenv("AICI_CACHE")
    assert ServerSettings.from_config({}).store == Path.home() / ".cache" / "aici" / "controllers"


def test_everything_set() -> None:
    settings = ServerSettings.from_config(
        {
            "store": "~/here",
            "store_bytes": 5,
            "tags": 7,
            "tags_of_user": 6,
            "restricted": True,
            "users": {"ann": HASH},
            "admins": ["ann"],
            "trust_user_headers": False,
        }
    )
    assert settings.store == Path.home() / "here" and settings.store_bytes == 5 and settings.restricted
    assert (settings.tags, settings.tags_of_user) == (7, 6)
    assert settings.users == {"ann": HASH} and settings.admins == {"ann"}


def test_admins_may_be_a_proxys_users() -> None:
    assert ServerSettings.from_config({"admins": ["ann"], "trust_user_headers": True}).admins == {"ann"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "mapping"),
        ({"stor": "x"}, "unknown setting 'stor'"),
        ({"store": 5}, "store must be of type str"),
        ({"store_bytes": 0}, "positive"),
        ({"tags": 0}, "aici.server.tags must be a positive number"),
        ({"tags_of_user": -1}, "positive"),
        ({"store_bytes": True}, "type int"),
        ({"restricted": "no"}, "type bool"),
        ({"users": ["ann"]}, "type dict"),
        ({"users": {"a b": HASH}}, "user's name"),
        ({"users": {"ann": "secret"}}, "sha256"),
        ({"admins": ["ann"]}, "none of aici.server.users"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerSettings.from_config(config)
