"""What a controller's name stands for: something installed, something stored, or nothing."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aici_vllm.controller.check import check_source
from aici_vllm.controller.limits import Limits
from aici_vllm.server.errors import UnknownControllerError, bad_request, forbidden
from aici_vllm.server.protocol import MODULE_ID, TAG
from aici_vllm.server.store import Store
from aici_vllm.server.users import User

NONE = "none"
"""Plain generation, without a controller."""

PYCTRL = ("pyctrl", "gh:microsoft/aici/pyctrl")
"""Upstream's interpreter of Python: here the script, which is its argument, is the controller."""

_HEX = re.compile(r"[0-9A-Fa-f]{21,}")


@dataclass(frozen=True)
class Catalog:
    """Every controller that this server knows by name.

    Attributes:
        installed: name → `module:function` of the operator's controllers.
        limits: what a script is checked against before it is stored.
    """

    store: Store
    limits: Limits
    installed: Callable[[], Mapping[str, str]]

    def source_of(self, name: str) -> str | None:
        """The text of a stored controller, by hash or tag; None for an installed one.

        Raises:
            UnknownControllerError: no controller goes by this name.
        """
        if name in self.installed():
            return None
        if re.fullmatch(MODULE_ID, name):
            return self.store.get(name)
        tag = self.store.tag(name)
        if tag is None:
            known = ", ".join(sorted(self.installed())) or "none is installed"
            raise UnknownControllerError(
                f"unknown controller {name!r}: no stored one has this tag, and installed are: {known}"
            )
        return self.store.get(tag.module_id)

    def check(self, source: bytes) -> None:
        """Refuse a source that could never run.

        Raises:
            ServiceError: what is wrong, and in which line.
        """
        try:
            check_source(source.decode(), self.limits)
        except UnicodeDecodeError as error:
            raise bad_request(f"the script is no UTF-8: byte {error.start} is {error.reason}") from None
        except ValueError as error:
            raise bad_request(str(error)) from None

    def check_tag(self, tag: str, user: User) -> None:
        """Refuse a name that this user cannot give.

        Raises:
            ServiceError: what names may look like.
        """
        if not re.fullmatch(TAG, tag):
            raise bad_request(f"{tag!r} is no tag: a letter, then up to 49 letters, digits, _, - or .")
        if _HEX.fullmatch(tag):
            raise bad_request(f"{tag!r} looks like a hash: choose another tag")
        if tag in (NONE, *PYCTRL) or tag in self.installed():
            raise bad_request(f"{tag!r} already names a controller of this server: choose another tag")
        existing = self.store.tag(tag)
        if existing is None and not user.admin and not tag.startswith(f"{user.name}."):
            raise forbidden(f"your tags begin with {user.name + '.'!r}: only an admin makes others")
