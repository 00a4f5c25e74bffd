"""How a route says no: an HTTP status and one sentence for whoever asked."""

from http import HTTPStatus
from pathlib import Path


class ServiceError(Exception):
    """A request that cannot be answered.

    Args:
        status: the HTTP status of the answer.
        message: what is wrong and what to do about it.
    """

    def __init__(self, status: HTTPStatus, message: str):
        self.status = status
        self.message = message
        super().__init__(message)


class UnknownControllerError(ServiceError):
    """Nothing goes by this name or hash."""

    def __init__(self, message: str):
        super().__init__(HTTPStatus.NOT_FOUND, message)


class StoreError(ServiceError):
    """The store cannot be read or written. `message` is for whoever asked; `str()` also says where.

    Args:
        place: the file or folder, which concerns nobody but the operator.
    """

    def __init__(self, message: str, place: Path, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE):
        super().__init__(status, message)
        self.place = place

    def __str__(self) -> str:
        return f"{self.message} ({self.place})"


def bad_request(message: str) -> ServiceError:
    """The request itself is wrong."""
    return ServiceError(HTTPStatus.BAD_REQUEST, message)


def forbidden(message: str) -> ServiceError:
    """The request is right, and this user may not make it."""
    return ServiceError(HTTPStatus.FORBIDDEN, message)
