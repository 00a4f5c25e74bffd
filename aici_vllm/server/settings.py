"""What the operator sets for the routes: `--additional-config '{"aici": {"server": {...}}}'`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aici_vllm.model import default_cache

USER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,29}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def default_store() -> Path:
    """`controllers` in the cache folder, where the embedded model is too."""
    return default_cache() / "controllers"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the routes.

    Attributes:
        store: folder of uploaded controllers and their tags; several servers may share it.
        store_bytes: what all uploaded sources may take together.
        tags: how many there may be.
        tags_of_user: how many of them may belong to one user who is no admin.
        restricted: refuse uploads and tags.
        users: name → sha256, in hex, of the API key that this user sends.
        admins: the users who may move everybody's tags.
        trust_user_headers: take the user from `x-user-id` and `x-user-role`, which a proxy sets.
    """

    store: Path = field(default_factory=default_store)
    store_bytes: int = 1 << 30
    tags: int = 10_000
    tags_of_user: int = 1_000
    restricted: bool = False
    users: Mapping[str, str] = field(default_factory=dict)
    admins: frozenset[str] = frozenset()
    trust_user_headers: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "ServerSettings":
        """Settings from the operator's mapping.

        Raises:
            ValueError: a setting does not exist, or has a value that makes no sense.
        """
        if not isinstance(config, dict):
            raise ValueError(f"aici.server must be a mapping of settings, not {config!r}")
        known = {one.name for one in fields(cls)}
        for name in config:
            if name not in known:
                raise ValueError(f"unknown setting {name!r} of aici.server; there are {sorted(known)}")
        given = dict(config)
        if "store" in given:
            given["store"] = Path(_checked("store", given["store"], str)).expanduser()
        for name in ("store_bytes", "tags", "tags_of_user"):
            if not _checked(name, given.get(name, 1), int) > 0:
                raise ValueError(f"aici.server.{name} must be a positive number, not {given[name]}")
        for name in ("restricted", "trust_user_headers"):
            _checked(name, given.get(name, False), bool)
        given["users"] = _users(given.get("users", {}))
        given["admins"] = _admins(given.get("admins", []), given["users"], given.get("trust_user_headers"))
        return cls(**given)


def _checked(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"aici.server.{name} must be of type {kind.__name__}, not {value!r}")
    return value


def _users(users: Any) -> dict[str, str]:
    for name, digest in _checked("users", users, dict).items():
        if not USER_NAME.fullmatch(name):
            raise ValueError(
                f"aici.server.users: {name!r} cannot be a user's name: a letter, then up to 29 letters, "
                "digits, _ or -"
            )
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(
                f"aici.server.users: {name!r} needs the sha256 of an API key as 64 lower-case hex digits"
            )
    return dict(users)


def _admins(admins: Any, users: dict[str, str], by_header: Any) -> frozenset[str]:
    for name in _checked("admins", admins, list):
        if name not in users and not by_header:
            raise ValueError(f"aici.server.admins: {name!r} is none of aici.server.users")
    return frozenset(admins)
