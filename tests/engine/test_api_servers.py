"""One engine behind two server processes: the store, names, live events and results, through both of them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.engine.test_server import Server, replay, start_server

COUNTED = """
import aici

async def main():
    me = aici.controller_arg()
    await aici.FixedTokens("I am " + me)
    branch = await aici.fork(2)
    await aici.gen_tokens(max_tokens=6)
    await aici.FixedTokens(f", says branch {branch} of {me}")
    aici.append_var("who", me)

aici.start(main)
"""


@dataclass
class Servers:
    """The server processes of one engine, told apart by which of them holds a connection."""

    base: str
    pids: list[int]

    @contextmanager
    def through(self, pid: int) -> Iterator[httpx.Client]:
        """A client whose only connection ends in the process `pid`."""
        for _ in range(1000):
            with self.connection() as (http, owner):
                if owner == pid:
                    yield http
                    assert owner_of(http, self.pids) == pid, "the connection was not kept"
                    return
        raise AssertionError(f"no connection of 1000 ended in the process {pid} of {self.pids}")

    @contextmanager
    def connection(self) -> Iterator[tuple[httpx.Client, int]]:
        """A fresh connection, and the process in which it ends."""
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
        with httpx.Client(base_url=self.base, timeout=120, limits=limits) as http:
            yield http, owner_of(http, self.pids)


def owner_of(http: httpx.Client, pids: list[int]) -> int:
    """The process in which the client's connection ends."""
    answer = http.get("/health")
    port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
    for _ in range(100):
        owners = [
            pid
            for pid in pids
            if any(c.raddr and c.raddr.port == port for c in psutil.Process(pid).net_connections("tcp"))
        ]
        if owners:
            (owner,) = owners
            return owner
    raise AssertionError(f"none of {pids} holds the connection from port {port}")


@pytest.fixture(scope="module")
def server(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"aici": {"server": {"store": str(tmp_path_factory.mktemp("store"))}}}
    flags = ("--api-server-count", "2", "--additional-config", json.dumps(settings))
    yield from start_server(embedded_folder, *flags)


@pytest.fixture(scope="module")
def servers(server: Server) -> Servers:
    port = server.http.base_url.port
    listening = {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections("tcp"))
    }
    assert len(listening) >= 2
    found = Servers(str(server.http.base_url), sorted(listening))
    answering: set[int] = set()
    for _ in range(1000):
        with found.connection() as (_, owner):
            answering.add(owner)
        if len(answering) == 2:
            break
    assert len(answering) == 2, f"only {answering} answered"
    return Servers(found.base, sorted(answering))


def run(http: httpx.Client, **request: Any) -> list[dict[str, Any]]:
    """The events of a run."""
    with http.stream("POST", "/v1/run", json={"max_tokens": 100, **request}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def upload(http: httpx.Client, source: str) -> str:
    headers = {"content-type": "text/x-python"}
    return str(
        http.post("/v1/controllers", content=source, headers=headers).raise_for_status().json()["module_id"]
    )


def tag(http: httpx.Client, module_id: str, *tags: str) -> None:
    http.post("/v1/controllers/tags", json={"module_id": module_id, "tags": tags}).raise_for_status()


def tags(http: httpx.Client) -> dict[str, str]:
    """tag → hash."""
    rows = http.get("/v1/controllers/tags").raise_for_status().json()["tags"]
    return {row["tag"]: row["module_id"] for row in rows}


def check_run(events: list[dict[str, Any]], me: str) -> None:
    """The run's events are its own, all of them, and add up to its results."""
    results = events[-1]["results"]
    told = replay(events)
    assert sorted(told) == [0, 1]
    for branch in results["branches"]:
        index = branch["index"]
        assert (branch["error"], branch["text"]) == (None, told[index]["text"])
        assert branch["text"].startswith(f"I am {me}")
        assert branch["text"].endswith(f", says branch {index} of {me}")
    assert results["variables"] == {"who": me * 2}
    assert len([event for event in events if event["object"] == "run"]) >= 6


def test_what_one_process_stores_runs_through_both(servers: Servers) -> None:
    first, second = servers.pids
    with servers.through(first) as http:
        module_id = upload(http, COUNTED)
    with servers.through(second) as http:
        tag(http, module_id, "counted")
    for pid in servers.pids:
        with servers.through(pid) as http:
            for name in (module_id, "counted"):
                check_run(run(http, controller=name, controller_arg=str(pid)), str(pid))
            body = {"model": "m", "prompt": "", "max_tokens": 100, "temperature": 0}
            body["vllm_xargs"] = {"controller": "counted", "controller_arg": "one"}
            answer = http.post("/v1/completions", json=body).raise_for_status().json()
            assert answer["choices"][0]["text"].startswith("I am one")


def test_runs_at_once_hear_their_own_events(servers: Servers) -> None:
    def several(pid: int, lane: int) -> None:
        with servers.through(pid) as http:
            for number in range(3):
                me = f"{pid}-{lane}-{number}"
                check_run(run(http, controller=COUNTED, controller_arg=me), me)

    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(several, pid, lane) for pid in servers.pids for lane in range(3)]
        for job in jobs:
            job.result()


def test_a_run_that_is_left_ends_for_both(servers: Servers) -> None:
    """Leaving a stream of one process ends that run, and none of the other's."""
    first, second = servers.pids
    long = COUNTED.replace("max_tokens=6", "max_tokens=60")
    with servers.through(second) as other, ThreadPoolExecutor(1) as threads:
        with httpx.Client(base_url=servers.base, timeout=120) as leaving:
            request = {"controller": COUNTED.replace("max_tokens=6", "max_tokens=1500"), "max_tokens": 1900}
            with leaving.stream("POST", "/v1/run", json=request) as answer:
                stays = threads.submit(run, other, controller=long, controller_arg="stays")
                assert any('"index":1' in line.replace(" ", "") for line in answer.iter_lines())
        check_run(stays.result(), "stays")
    with servers.through(first) as http:
        for _ in range(200):
            run(http, controller="none", prompt="a", max_tokens=1)
            usage = re.findall(r"^vllm:kv_cache_usage_perc.*$", http.get("/metrics").text, re.MULTILINE)
            if max(float(line.split()[-1]) for line in usage) == 0:
                return
    raise AssertionError("blocks are still in use")


def test_tags_move_as_one_through_both(servers: Servers) -> None:
    with servers.through(servers.pids[0]) as http:
        modules = [upload(http, f"{COUNTED}# {number}\n") for number in range(4)]
        tag(http, modules[0], "left", "right")
    over = threading.Event()

    def move(pid: int, module_id: str) -> None:
        with servers.through(pid) as http:
            for _ in range(20):
                tag(http, module_id, "left", "right")

    def watch(pid: int) -> int:
        looks = 0
        with servers.through(pid) as http:
            while not over.is_set():
                found = tags(http)
                assert found["left"] == found["right"]
                looks += 1
        return looks

    with ThreadPoolExecutor(6) as threads:
        watchers = [threads.submit(watch, pid) for pid in servers.pids]
        movers = [threads.submit(move, servers.pids[n % 2], module) for n, module in enumerate(modules)]
        wait(movers)
        over.set()
        for mover in movers:
            mover.result()
        assert all(watcher.result() > 0 for watcher in watchers)
    seen = []
    for pid in servers.pids:
        with servers.through(pid) as http:
            seen.append(tags(http))
    assert seen[0] == seen[1] and seen[0]["left"] == seen[0]["right"]


def test_metrics_of_both_are_one_page(servers: Servers) -> None:
    before = {pid: ended_well(servers, pid) for pid in servers.pids}
    for pid in servers.pids:
        with servers.through(pid) as http:
            check_run(run(http, controller=COUNTED, controller_arg="a"), "a")
            # The counts of a step leave with its outputs, and this is the next one.
            run(http, controller="none", prompt="a", max_tokens=1)
    assert [ended_well(servers, pid) - before[pid] for pid in servers.pids] == [4, 4]


def ended_well(servers: Servers, pid: int) -> float:
    """How many branches have ended well, as the process `pid` shows it."""
    with servers.through(pid) as http:
        page = http.get("/metrics").text
    found = re.findall(r'^vllm:aici_ended_branches_total\{.*finish_reason="stop".*\} (.*)$', page, re.M)
    return sum(map(float, found))
