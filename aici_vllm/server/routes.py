"""The routes themselves: `/v1/controllers`, `/v1/controllers/tags`, `/v1/run`."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from aici_vllm.server import protocol, runs
from aici_vllm.server.catalog import Catalog
from aici_vllm.server.errors import ServiceError, StoreError, bad_request, forbidden
from aici_vllm.server.settings import ServerSettings
from aici_vllm.server.store import Store, StoredController, Tag
from aici_vllm.server.users import User, user_of

logger = logging.getLogger(__name__)

SOURCE_TYPES = ("text/x-python", "text/plain")
"""Content types of a script; a client that names none is believed to send one."""


EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Service:
    """What the routes work with; `app.state.aici` while the server runs.

    Attributes:
        has_keys: whether clients need one of vLLM's API keys.
    """

    settings: ServerSettings
    catalog: Catalog
    front: runs.Front
    has_keys: bool

    @property
    def store(self) -> Store:
        return self.catalog.store


def attach(app: FastAPI) -> None:
    """Add the routes to vLLM's server, and its answer to what they refuse."""
    app.include_router(router)
    app.add_exception_handler(ServiceError, _refuse)
    make_page = app.openapi

    def openapi() -> dict[str, Any]:
        page = make_page()
        # FastAPI lists every model as JSON; a run answers with events and nothing else.
        page["paths"]["/v1/run"]["post"]["responses"]["200"]["content"].pop("application/json", None)
        return page

    app.openapi = openapi  # type: ignore[method-assign]


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    if isinstance(error, StoreError):
        logger.error("%s %s: %s", request.method, request.url.path, error)
    kind = "".join(error.status.phrase.title().split()) + "Error"
    body = protocol.Error(message=error.message, type=kind, code=error.status)
    return JSONResponse(protocol.ErrorAnswer(error=body).model_dump(), status_code=error.status)


def _refusals(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    always = (HTTPStatus.UNAUTHORIZED, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE)
    return {status.value: {"model": protocol.ErrorAnswer} for status in (*statuses, *always)}


class _Route(APIRoute):
    """A route whose every refusal has the same shape: FastAPI's own for a broken body has another."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException as error:
                raise ServiceError(HTTPStatus(error.status_code), str(error.detail)) from None

        return handle


router = APIRouter(tags=["controllers"], route_class=_Route)

_SOURCE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "text/x-python": {
                "schema": {"type": "string", "minLength": 1, "description": "source of a controller"}
            }
        },
    }
}


@router.post(
    "/v1/controllers",
    response_model=protocol.Uploaded,
    openapi_extra=_SOURCE_BODY,
    responses=_refusals(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.INSUFFICIENT_STORAGE,
    ),
)
async def upload(request: Request) -> protocol.Uploaded:
    """Store the source of a controller. The same source gives the same `module_id`, whoever sends it."""
    service = _service(request)
    _check_may_write(service)
    started = time.monotonic()
    source = await _body(request, service.catalog.limits.source_bytes)
    await asyncio.to_thread(service.catalog.check, source)
    stored = await asyncio.to_thread(service.store.put, source)
    return protocol.Uploaded(
        module_id=stored.module_id,
        wasm_size=stored.size,
        compiled_size=stored.size,
        time=round(1000 * (time.monotonic() - started)),
    )


@router.get("/v1/controllers", response_model=protocol.Controllers, responses=_refusals())
async def controllers(request: Request) -> Response:
    """Every controller that a request can name: the operator's, and those that were uploaded."""
    return await _answer_from_thread(_controllers, _service(request))


@router.get("/v1/controllers/tags", response_model=protocol.Tags, responses=_refusals())
async def tags(request: Request) -> Response:
    """Every tag, the one that moved last first."""
    return await _answer_from_thread(_all_tags, _service(request).store)


@router.post(
    "/v1/controllers/tags",
    response_model=protocol.Tags,
    responses=_refusals(
        HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.INSUFFICIENT_STORAGE
    ),
)
async def move_tags(body: protocol.MoveTags, request: Request) -> protocol.Tags:
    """Make tags for a stored controller, or move those that exist: all of them, or none."""
    service = _service(request)
    _check_may_write(service)
    user = user_of(request.headers, service.settings, service.has_keys)
    return await asyncio.to_thread(_move_tags, service, body, user)


@router.post(
    "/v1/run",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events: an InitialRun, a Run for every step, then `[DONE]`",
            "content": {EVENT_STREAM: {"schema": {"$ref": "#/components/schemas/RunEvent"}}},
            "model": protocol.RunEvent,
        },
        **_refusals(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
    },
)
async def run(body: protocol.RunRequest, request: Request) -> StreamingResponse:
    """Run a controller, and tell of every branch after each step. Leaving ends the request."""
    service = _service(request)
    prepared = await runs.prepare(service.front, service.catalog, body)
    events: AsyncIterator[str] = runs.stream(service.front, prepared, request.headers)
    return StreamingResponse(events, media_type=EVENT_STREAM)


def _service(request: Request) -> Service:
    service = getattr(request.app.state, "aici", None)
    if not isinstance(service, Service):
        raise ServiceError(
            HTTPStatus.SERVICE_UNAVAILABLE, "this server has no engine that generates: it runs no controllers"
        )
    return service


def _check_may_write(service: Service) -> None:
    if service.settings.restricted:
        raise forbidden("module upload disabled: this server's operator lets nobody add controllers or tags")


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request, as long as it has at most `limit` bytes."""
    kind = request.headers.get("content-type", SOURCE_TYPES[0]).partition(";")[0].strip().lower()
    if kind not in SOURCE_TYPES:
        raise ServiceError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"a controller is Python source: send content-type {SOURCE_TYPES[0]}, not {kind}",
        )
    source = bytearray()
    async for piece in request.stream():
        source += piece
        if len(source) > limit:
            raise ServiceError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a script may have {limit} bytes, and this one has more"
            )
    if not source:
        raise bad_request("the body is empty: it must be the source of a controller")
    return bytes(source)


async def _answer_from_thread(make: Callable[..., BaseModel], *arguments: Any) -> Response:
    """An answer read and written beside the event loop: FastAPI would write a long one on it."""
    text = await asyncio.to_thread(lambda: make(*arguments).model_dump_json())
    return Response(text, media_type="application/json")


def _controllers(service: Service) -> protocol.Controllers:
    tags = defaultdict[str, list[str]](list)
    for tag in service.store.tags():
        tags[tag.module_id].append(tag.tag)
    installed = service.catalog.installed()
    return protocol.Controllers(
        installed=[
            protocol.InstalledController(name=name, target=installed[name]) for name in sorted(installed)
        ],
        stored=[
            protocol.StoredController(
                module_id=one.module_id,
                size=one.size,
                uploaded_at=int(one.uploaded_at),
                tags=sorted(tags[one.module_id]),
            )
            for one in service.store.sources()
        ],
    )


def _all_tags(store: Store) -> protocol.Tags:
    return _tags(store.tags(), store.sources())


def _move_tags(service: Service, body: protocol.MoveTags, user: User) -> protocol.Tags:
    for tag in body.tags:
        service.catalog.check_tag(tag, user)
    moved = service.store.move_tags(body.module_id, body.tags, user.name, user.admin)
    return _tags(moved, service.store.sources())


def _tags(found: list[Tag], stored: list[StoredController]) -> protocol.Tags:
    sizes = {one.module_id: one.size for one in stored}
    return protocol.Tags(
        tags=[
            protocol.Tag(
                tag=tag.tag,
                module_id=tag.module_id,
                owner=tag.owner,
                updated_at=int(tag.updated_at),
                updated_by=tag.updated_by,
                wasm_size=sizes.get(tag.module_id, 0),
                compiled_size=sizes.get(tag.module_id, 0),
            )
            for tag in found
        ]
    )
