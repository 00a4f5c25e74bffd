"""OpenTelemetry spans: one for each controlled request, inside the client's trace, where vLLM traces.

vLLM's `--otlp-traces-endpoint` turns them on, and a request's `traceparent` header says what they belong to.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.tracing import extract_trace_context, init_tracer, is_tracing_available
from vllm.v1.request import Request

from aici_vllm.engine.controlled import ControlledGroup

SPAN = "controller"
MOST_EVENTS = 128
"""Events of one span; what happens later is only counted."""

Attribute = str | int | float | bool | list[int]
Attributes = dict[str, Attribute]


@dataclass(slots=True)
class Trace:
    """What happened in one request so far: when, what, and its particulars."""

    events: list[tuple[int, str, Attributes]] = field(default_factory=list)
    dropped: int = 0


class Tracing:
    """Collects the events of live requests and makes the span of each when it is over."""

    def __init__(self, vllm_config: VllmConfig):
        self._traces: dict[ControlledGroup, Trace] = {}
        self._tracer = tracer_of(vllm_config)

    def event(self, group: ControlledGroup, name: str, **attributes: Attribute) -> None:
        """Note that something happened now."""
        if self._tracer is None:
            return
        trace = self._traces.setdefault(group, Trace())
        if len(trace.events) < MOST_EVENTS:
            trace.events.append((time.time_ns(), name, attributes))
        else:
            trace.dropped += 1

    def end(self, group: ControlledGroup, summary: dict[str, Any]) -> None:
        """Make the span of a request that is over; `summary` becomes its attributes."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        trace = self._traces.pop(group, Trace())
        request: Request = group.root.request
        span = self._tracer.start_span(
            SPAN,
            context=extract_trace_context(request.trace_headers),
            kind=SpanKind.INTERNAL,
            start_time=int(request.arrival_time * 1e9),
            attributes={**span_attributes(summary), "aici.dropped_events": trace.dropped},
        )
        for at, name, attributes in trace.events:
            span.add_event(name, attributes, at)
        errors = [branch.error for branch in group.group.branches if branch.error is not None]
        if errors:
            span.set_status(Status(StatusCode.ERROR, errors[0]))
        span.end()


def tracer_of(vllm_config: VllmConfig) -> Any:
    """The tracer of this process, or None where vLLM does not trace."""
    endpoint = vllm_config.observability_config.otlp_traces_endpoint
    if endpoint is None or not is_tracing_available():
        return None
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        # vLLM sets one up in an engine's process only if the front-end was made before it.
        init_tracer("aici_vllm", endpoint)
    return trace.get_tracer("aici_vllm")


def span_attributes(summary: dict[str, Any]) -> Attributes:
    """A summary without its levels: `aici.usage.sampled_tokens`, `aici.finish_reasons.stop`."""
    flat: Attributes = {"gen_ai.request.id": summary["id"]}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"aici.{key}.{inner}": number for inner, number in value.items()}
        elif key != "id":
            flat[f"aici.{key}"] = value
    return flat
