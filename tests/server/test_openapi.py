"""The OpenAPI page against what the routes do, tried out by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.server.conftest import Served, serving

OPERATIONS = [
    ("/v1/controllers", "get"),
    ("/v1/controllers", "post"),
    ("/v1/controllers/tags", "get"),
    ("/v1/controllers/tags", "post"),
    ("/v1/run", "post"),
]


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("openapi")) as served:
        module_id = served.upload().json()["module_id"]
        served.tag(module_id, "hello")
        yield served


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
TRIED = [
    (path, method, mode)
    for path, method in OPERATIONS
    # A GET without parameters has nothing that could be wrong.
    for mode in ([POSITIVE] if method == "get" else [POSITIVE, NEGATIVE])
]


@pytest.mark.parametrize(("path", "method", "mode"), TRIED)
def test_the_routes_do_what_the_page_says(
    living: Served, path: str, method: str, mode: schemathesis.GenerationMode
) -> None:
    page = schemathesis.openapi.from_asgi("/openapi.json", living.app)
    operation = page[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=5 if method == "get" else 40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def try_out(case: schemathesis.Case) -> None:
        if path == "/v1/run" and mode is POSITIVE:
            case.body["controller"] = ("hello", "greet", "none", "unknown")[len(str(case.body)) % 4]
        # No schema can say which names are known and which text is a script.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    try_out()


def test_every_route_and_model_is_on_the_page(living: Served) -> None:
    page = living.http.get("/openapi.json").json()
    assert sorted((path, method) for path, one in page["paths"].items() for method in one) == OPERATIONS
    assert {"RunRequest", "Run", "Fork", "Usage", "Tags", "Uploaded", "ErrorAnswer"} <= page["components"][
        "schemas"
    ].keys()
