"""Who sends a request, and whether they are an admin."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from aici_vllm.server.errors import bad_request
from aici_vllm.server.settings import USER_NAME, ServerSettings


@dataclass(frozen=True)
class User:
    """Whoever sends a request."""

    name: str
    admin: bool


def user_of(headers: Mapping[str, str], settings: ServerSettings, has_keys: bool) -> User:
    """The user behind a request that vLLM has let in.

    A proxy's headers count only if the operator trusts them. Otherwise the API key tells users apart: one
    that `settings.users` names, or `key-` and the start of the key's hash. A server without keys is open
    to everybody, so there everybody is the same admin.

    Args:
        headers: of the request, with case-insensitive names.
        has_keys: whether the server was started with `--api-key`.

    Raises:
        ServiceError: the proxy sent a name that is none.
    """
    if settings.trust_user_headers:
        name = headers.get("x-user-id", "localhost")
        if not USER_NAME.fullmatch(name):
            raise bad_request(f"x-user-id: {name!r} is no user's name: letters, digits, _ and -")
        return User(name, headers.get("x-user-role") == "admin" or name in settings.admins)
    if not has_keys:
        return User("localhost", admin=True)
    key = headers.get("authorization", "").partition(" ")[2]
    digest = hashlib.sha256(key.encode()).hexdigest()
    known = {digest: name for name, digest in settings.users.items()}
    name = known.get(digest, f"key-{digest[:8]}")
    return User(name, name in settings.admins)
