"""What an operator sees: counts that reach `/metrics`, a log line and a span for each controlled request."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from aici_vllm.engine import plugin, request_log
from aici_vllm.engine.metrics import ControllerMetrics, Counts, put_counts, take_counts
from aici_vllm.engine.tracing import MOST_EVENTS
from tests.controller.scripts import script
from tests.engine.test_server import GREETING, start_server
from tests.simulator.test_sandbox_in_engine import SETTINGS, Sandboxed

TRACE = "0123456789abcdef0123456789abcdef"
PARENT = "0123456789abcdef"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


def config(scheduler: str | None, model: str = "m") -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=model),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
    )


def sent(counts: Counts) -> SchedulerStats:
    """The statistics of a step, as a front-end gets them."""
    stats = SchedulerStats()
    put_counts(stats, counts)
    data = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    arrived: SchedulerStats = MsgpackDecoder(EngineCoreOutputs).decode(data).scheduler_stats
    return arrived


# Counts.


def test_differences_travel_and_nothing_when_nothing_changed() -> None:
    counts = Counts()
    assert counts.take() is None
    counts.forks, counts.live_groups = 3, 1
    counts.ended["stop"] += 2
    assert take_counts(sent(counts)) == {
        "counters": {"forks": 3},
        "ended": {"stop": 2},
        "gauges": {"live_groups": 1, "live_branches": 0, "thinking_groups": 0},
    }
    assert counts.take() is None
    counts.forks, counts.script_seconds = 5, 0.25
    taken = counts.take()
    assert taken is not None
    assert taken["counters"] == {"forks": 2, "script_seconds": 0.25}
    assert taken["ended"] == {}


def test_nobody_sees_the_counts_after_us() -> None:
    stats = SchedulerStats()
    counts = Counts(forks=1)
    put_counts(stats, counts)
    assert take_counts(stats) is not None
    assert stats.kv_connector_stats is None
    stats.kv_connector_stats = {"a connector's": 1}
    assert take_counts(stats) is None
    assert stats.kv_connector_stats == {"a connector's": 1}


@pytest.fixture
def metrics() -> Iterator[ControllerMetrics]:
    unregister_vllm_metrics()
    yield ControllerMetrics(config("aici_vllm.Scheduler"), [0, 1])
    unregister_vllm_metrics()


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:aici_{name}", {"model_name": "m", **labels})


def test_metrics_add_up_by_engine(metrics: ControllerMetrics) -> None:
    engines = [Counts(), Counts()]
    for step in range(1, 4):
        for index, counts in enumerate(engines):
            counts.steps = step * (index + 1)
            counts.live_branches = step
            counts.ended["fail"] += 1
            metrics.record(sent(counts), None, engine_idx=index)
    metrics.record(None, None)
    metrics.record(SchedulerStats(), None)
    assert [value("steps_total", engine=e) for e in "01"] == [3, 6]
    assert [value("live_branches", engine=e) for e in "01"] == [3, 3]
    assert [value("ended_branches_total", engine=e, finish_reason="fail") for e in "01"] == [3, 3]
    assert value("forks_total", engine="0") == 0


def test_an_engine_without_our_scheduler_has_no_such_metrics() -> None:
    for scheduler in (None, "vllm.v1.core.sched.scheduler.Scheduler"):
        assert plugin._metrics(config(scheduler), [0], None) is None


# The log line and the span, of a simulated engine.

FORKS = script(
    """
    await aici.FixedTokens("ab")
    branch = await aici.fork(3)
    if branch == 2:
        raise ValueError("this one fails")
    await aici.gen_tokens(max_tokens=2)
    """
)


@pytest.fixture
def engine() -> Iterator[Sandboxed]:
    engine = Sandboxed(SETTINGS)
    yield engine
    engine.scheduler.shutdown()


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == request_log.LOGGER]


def test_a_line_for_each_request_that_is_over(engine: Sandboxed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, request_log.LOGGER)
    job = engine.add_script(FORKS)
    engine.run([job])
    abandoned = engine.add_script(FORKS)
    engine.abort([abandoned.name], during_step=False)
    line, abandoned_line = lines(caplog)
    assert job.results is not None
    assert line["event"] == "controller_finished"
    assert line["id"] == job.name
    assert re.fullmatch("sha256:[0-9a-f]{64}", line["controller"])
    assert (line["branches"], line["errors"]) == (3, 1)
    assert line["finish_reasons"] == {"stop": 2, "fail": 1}
    assert line["usage"] == job.results["usage"]
    assert line["script_seconds"] > 0
    assert line["prompt_tokens"] == 3
    assert (abandoned_line["id"], abandoned_line["finish_reasons"]) == (abandoned.name, {"abort": 1})


def test_counts_of_a_request(engine: Sandboxed) -> None:
    job = engine.add_script(FORKS)
    engine.run([job])
    counts = engine.scheduler.telemetry.counts
    assert job.results is not None
    usage = job.results["usage"]
    assert (counts.forks, counts.ended) == (2, {"stop": 2, "fail": 1})
    assert (counts.sampled_tokens, counts.spliced_tokens) == (
        usage["sampled_tokens"],
        usage["spliced_tokens"],
    )
    assert counts.forward_passes == usage["forward_passes"] + usage["discarded_rows"]
    assert 0 < counts.steps <= counts.forward_passes
    assert counts.script_seconds > 0
    stats = SchedulerStats()
    engine.scheduler.telemetry.report(stats, engine.scheduler)
    assert counts.sandbox_turns == engine.sandbox().turns > 0
    assert counts.masks_built + counts.masks_reused > 0
    assert (counts.live_groups, counts.live_branches) == (0, 0)
    assert stats.kv_connector_stats is not None


@pytest.fixture
def spans(engine: Sandboxed) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine.scheduler.telemetry._tracing._tracer = provider.get_tracer("test")
    return exporter


def test_a_span_in_the_client_s_trace(engine: Sandboxed, spans: InMemorySpanExporter) -> None:
    job = engine.add_script(FORKS)
    engine.scheduler.requests[job.name].trace_headers = HEADERS
    engine.run([job])
    (span,) = spans.get_finished_spans()
    assert span.context is not None and span.parent is not None and span.attributes is not None
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
    assert span.attributes["gen_ai.request.id"] == job.name
    assert span.attributes["aici.finish_reasons.stop"] == 2
    assert span.attributes["aici.usage.sampled_tokens"] == 4
    assert not span.status.is_ok and "this one fails" in str(span.status.description)
    names = [event.name for event in span.events]
    assert names.count("fork") == 1 and names.count("end") == 3 and "splice" in names
    (fork,) = (event for event in span.events if event.name == "fork")
    assert dict(fork.attributes or {}) == {"branch": 0, "children": (1, 2)}


def test_a_span_counts_the_events_it_has_no_room_for(engine: Sandboxed, spans: InMemorySpanExporter) -> None:
    label = "start = aici.Label()\nfor _ in range(150):\n"
    body = label + "    await aici.gen_tokens(max_tokens=1)\n    await aici.FixedTokens('a', following=start)"
    engine.run([engine.add_script(script(body))])
    (span,) = spans.get_finished_spans()
    assert len(span.events) == MOST_EVENTS
    assert span.attributes is not None and int(str(span.attributes["aici.dropped_events"])) > 0


# All of it on a server.


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An endpoint for traces over HTTP, and the spans that came there."""
    found: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_shows_metrics_lines_and_spans(
    embedded_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with collector() as (endpoint, found):
        environment = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        flags = ("--otlp-traces-endpoint", endpoint)
        with contextmanager(start_server)(embedded_folder, *flags, **environment) as server:
            source = GREETING.format("await aici.gen_tokens(max_tokens=3)")
            client = server.client.with_options(default_headers=HEADERS)
            answer = client.completions.create(
                model="m", prompt="", max_tokens=50, extra_body={"vllm_xargs": {"controller": source}}
            )
            # The counts of a step leave with its outputs, and this is the next one.
            server.client.completions.create(model="m", prompt="a", max_tokens=1)
            page = server.http.get("/metrics").text
    os.fsync(1)
    assert re.search(r'^vllm:aici_ended_branches_total\{.*finish_reason="stop".*\} 1\.0$', page, re.M)
    assert re.search(r"^vllm:aici_sampled_tokens_total\{.*\} 3\.0$", page, re.M)
    assert re.search(r"^vllm:aici_live_groups\{.*\} 0\.0$", page, re.M)
    output = capfd.readouterr().out
    (line,) = (json.loads(line) for line in output.splitlines() if line.startswith('{"event"'))
    assert line["id"].startswith(answer.id)
    assert line["usage"]["sampled_tokens"] == 3
    in_trace = {span.name: span for span in found if span.trace_id.hex() == TRACE}
    assert set(in_trace) >= {"controller", "llm_request"}
    assert in_trace["controller"].parent_span_id.hex() == PARENT
    assert in_trace["llm_request"].parent_span_id.hex() == PARENT
