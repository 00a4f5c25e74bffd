"""The routes for controllers and tags: what they answer, to whom, and what they refuse."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from aici_vllm.server import routes
from aici_vllm.server.store import Tag
from tests.server.conftest import SCRIPT, Served, serving

HASH = hashlib.sha256(SCRIPT.encode()).hexdigest()


def message(response: object) -> str:
    return str(response.json()["error"]["message"])  # type: ignore[attr-defined]


def test_an_uploaded_script_is_listed_with_its_tags(served: Served) -> None:
    answer = served.upload()
    assert answer.status_code == 200
    size = len(SCRIPT)
    assert answer.json() | {"time": 0} == {
        "module_id": HASH,
        "wasm_size": size,
        "compiled_size": size,
        "time": 0,
    }
    (tag,) = served.tag(HASH, "hello").json()["tags"]
    assert (tag["tag"], tag["module_id"], tag["owner"], tag["updated_by"], tag["wasm_size"]) == (
        "hello",
        HASH,
        "localhost",
        "localhost",
        size,
    )
    assert served.http.get("/v1/controllers/tags").json() == {"tags": [tag]}
    listed = served.http.get("/v1/controllers").json()
    assert listed["installed"] == [{"name": "greet", "target": "package.module:greet"}]
    (stored,) = listed["stored"]
    assert (stored["module_id"], stored["size"], stored["tags"]) == (HASH, size, ["hello"])


def test_lists_are_made_beside_the_event_loop_and_tags_looked_through_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tags(list[Tag]):
        looked_through: ClassVar[list[bool]] = []

        def __iter__(self) -> Iterator[Tag]:
            self.looked_through.append(asyncio._get_running_loop() is not None)
            return super().__iter__()

    for n in range(3):
        module_id = served.upload(f"{SCRIPT}# {n}\n").json()["module_id"]
        served.tag(module_id, f"t{n}", f"u{n}")
    tags = Tags(served.store.tags())
    monkeypatch.setattr(served.store, "tags", lambda: tags)
    listed = served.http.get("/v1/controllers").json()["stored"]
    assert sorted(one["tags"] for one in listed) == [["t0", "u0"], ["t1", "u1"], ["t2", "u2"]]
    assert Tags.looked_through == [False]
    assert len(served.http.get("/v1/controllers/tags").json()["tags"]) == 6
    assert Tags.looked_through == [False, False]


def test_a_script_that_the_sandbox_would_not_take_is_refused_with_its_line(served: Served) -> None:
    answer = served.upload("import aici\nclass A(int):\n    pass\naici.start(A)\n")
    assert answer.status_code == 400 and "line 2" in message(answer)
    assert served.store.sources() == []


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"\0"])
def test_a_body_that_is_no_script_is_refused(served: Served, body: bytes) -> None:
    headers = {"content-type": "text/x-python; charset=utf-8"}
    answer = served.http.post("/v1/controllers", content=body, headers=headers)
    assert answer.status_code == 400 and message(answer)


def test_other_content_types_are_refused(served: Served) -> None:
    answer = served.upload(headers={"content-type": "application/wasm"})
    assert answer.status_code == 415 and "text/x-python" in message(answer)


def test_a_body_over_the_limit_is_refused_before_it_is_read(served: Served) -> None:
    pieces, sent = 0, []

    async def receive() -> dict[str, object]:
        nonlocal pieces
        pieces += 1
        assert pieces < 100, "a body without end is read on and on"
        return {"type": "http.request", "body": b"#" * (1 << 16), "more_body": True}

    async def send(part: dict[str, object]) -> None:
        sent.append(part)

    scope = {"type": "http", "method": "POST", "path": "/v1/controllers", "query_string": b"", "headers": []}
    asyncio.run(served.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413 and b"1048576" in sent[1]["body"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("tag", "status", "said"),
    [
        ("a" * 21, 400, "hash"),
        ("greet", 400, "already names"),
        ("none", 400, "already names"),
        ("pyctrl", 400, "already names"),
        ("1st", 400, "tags"),
        ("a" * 51, 400, "tags"),
        ("", 400, "tags"),
        ("Fine-1_2.x", 200, ""),
    ],
)
def test_what_a_tag_may_be(served: Served, tag: str, status: int, said: str) -> None:
    served.upload()
    answer = served.tag(HASH, tag)
    assert answer.status_code == status
    assert status == 200 or said in message(answer)


def test_a_tag_for_what_is_not_there(served: Served) -> None:
    answer = served.tag("0" * 64, "a")
    assert answer.status_code == 404 and "upload it first" in message(answer)
    assert served.tag("not a hash", "a").status_code == 400
    assert served.tag(HASH).status_code == 400, "no tags at all"


def test_a_restricted_server_takes_nothing_in(tmp_path: Path) -> None:
    with serving(tmp_path, restricted=True) as served:
        assert served.upload().status_code == served.tag(HASH, "a").status_code == 403
        assert served.http.get("/v1/controllers").status_code == 200
        assert served.run().status_code == 200


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = ["ann-key", "bob-key", "boss-key", "guest-key"]
USERS = {"ann": digest("ann-key"), "bob": digest("bob-key"), "boss": digest("boss-key")}


def bearer(name: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {name}-key"}}


def test_api_keys_protect_every_route(tmp_path: Path) -> None:
    with serving(tmp_path, keys=KEYS) as served:
        for method, path in [
            ("get", "/v1/controllers"),
            ("post", "/v1/controllers"),
            ("get", "/v1/controllers/tags"),
            ("post", "/v1/controllers/tags"),
            ("post", "/v1/run"),
        ]:
            assert getattr(served.http, method)(path).status_code == 401
            wrong = {"authorization": "Bearer wrong"}
            assert getattr(served.http, method)(path, headers=wrong).status_code == 401
        assert served.http.get("/v1/controllers", **bearer("ann")).status_code == 200


def test_owners_and_admins_move_tags_and_nobody_else(tmp_path: Path) -> None:
    with serving(tmp_path, keys=KEYS, users=USERS, admins=frozenset(["boss"])) as served:
        for name in ("ann", "bob"):
            assert served.upload(**bearer(name)).json()["module_id"] == HASH
        other = served.upload(SCRIPT + "#\n", **bearer("bob")).json()["module_id"]
        refused = served.tag(HASH, "plain", **bearer("ann"))
        assert refused.status_code == 403 and "'ann.'" in message(refused)
        assert served.tag(HASH, "ann.x", **bearer("ann")).status_code == 200
        for user in ("bob", "guest"):
            refused = served.tag(other, "ann.x", **bearer(user))
            assert refused.status_code == 403 and "belongs to ann" in message(refused)
        (moved,) = served.tag(other, "ann.x", **bearer("boss")).json()["tags"]
        assert (moved["module_id"], moved["owner"], moved["updated_by"]) == (other, "ann", "boss")
        assert served.tag(HASH, "plain", **bearer("boss")).status_code == 200
        assert served.tag(HASH, "ann.x", **bearer("ann")).status_code == 200


def test_a_key_without_a_name_is_a_user_too(tmp_path: Path) -> None:
    with serving(tmp_path, keys=KEYS) as served:
        served.upload(**bearer("guest"))
        name = f"key-{digest('guest-key')[:8]}"
        (tag,) = served.tag(HASH, f"{name}.x", **bearer("guest")).json()["tags"]
        assert tag["owner"] == name
        assert served.tag(HASH, f"{name}.x", **bearer("ann")).status_code == 403


def test_a_proxys_headers_count_only_where_they_are_trusted(tmp_path: Path) -> None:
    as_admin = {"headers": {"x-user-id": "ann", "x-user-role": "admin"}}
    as_user = {"headers": {"x-user-id": "bob", "x-user-role": "user"}}
    with serving(tmp_path / "1", trust_user_headers=True) as served:
        served.upload()
        (tag,) = served.tag(HASH, "x", **as_admin).json()["tags"]
        assert tag["owner"] == "ann"
        assert served.tag(HASH, "x", **as_user).status_code == 403
        assert served.tag(HASH, "y").status_code == 403, "without a role nobody is an admin"
        odd = {"headers": {"x-user-id": "bob smith"}}
        assert served.tag(HASH, "x", **odd).status_code == 400
    with serving(tmp_path / "2", keys=KEYS) as served:
        headers = {"headers": {**as_admin["headers"], **bearer("ann")["headers"]}}
        served.upload(**headers)
        assert served.tag(HASH, "x", **headers).status_code == 403


def test_a_store_that_fails_is_told_to_the_client_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(tmp_path / "file" / "store") as served:
        for answer in (served.upload(), served.http.get("/v1/controllers"), served.run("some.tag")):
            assert answer.status_code == 503
            assert "Not a directory" in message(answer) and str(tmp_path) not in message(answer)
        assert served.run(SCRIPT).status_code == 200, "scripts that come along need no store"


def test_a_full_store_answers_507(tmp_path: Path) -> None:
    with serving(tmp_path, store_bytes=10) as served:
        answer = served.upload()
        assert answer.status_code == 507 and "no room" in message(answer)


def test_tags_are_refused_where_there_are_too_many(tmp_path: Path) -> None:
    with serving(tmp_path, keys=KEYS, users=USERS, tags=3, tags_of_user=2) as served:
        served.upload(**bearer("ann"))
        assert served.tag(HASH, "ann.a", "ann.b", **bearer("ann")).status_code == 200
        refused = served.tag(HASH, "ann.c", **bearer("ann"))
        assert refused.status_code == 403 and "allows a user 2 tags" in message(refused)
        full = served.tag(HASH, "bob.a", "bob.b", **bearer("bob"))
        assert full.status_code == 507 and "allows 3 tags" in message(full)


def test_a_server_without_an_engine_says_so() -> None:
    app = FastAPI()
    routes.attach(app)
    with TestClient(app) as http:
        answer = http.get("/v1/controllers")
    assert answer.status_code == 503 and "runs no controllers" in message(answer)
