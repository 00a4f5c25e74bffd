"""Counts of what controllers do: kept by the scheduler, shown by `/metrics` beside vLLM's own.

The scheduler and `/metrics` live in different processes. vLLM sends its `SchedulerStats` from one to the
other after every step. Ours ride in their `kv_connector_stats`: free-form, and empty in an engine that runs
controllers, since those refuse KV connectors. Differences travel, not totals, so they add up whichever
of several API servers gets them.
"""

from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "vllm:aici_"
"""vLLM exposes and replaces metrics of its own prefix only."""

COUNTERS = {
    "steps": "Engine steps that computed at least one controlled branch.",
    "forward_passes": "Branches computed, summed over steps.",
    "splices": "Times that a branch's tokens were replaced or added without sampling.",
    "forks": "Branches made by forks.",
    "parks": "Times that a branch was taken out of the batch: it waited, or its script computed.",
    "masks_built": "Mask rows computed and sent to the workers.",
    "masks_reused": "Mask rows found on the workers' devices.",
    "sampled_tokens": "Tokens sampled by branches that ended.",
    "spliced_tokens": "Tokens spliced by branches that ended.",
    "discarded_rows": "Rows computed in vain, because a splice overtook them, in branches that ended.",
    "script_seconds": "Time that the scripts of ended branches computed, sandboxed and installed ones.",
    "sandbox_seconds": "CPU time that scripts used in the sandbox.",
    "sandbox_turns": "Turns that scripts took in the sandbox: from one await to the next.",
    "sandbox_late_turns": "Turns in the sandbox that took longer than a step may.",
    "sandbox_restarts": "Sandbox processes that died or were killed, and were replaced.",
}
ENDED = "ended_branches"
ENDED_HELP = "Branches that ended, by finish reason."
GAUGES = {
    "live_groups": "Controlled requests that have not ended.",
    "live_branches": "Their branches that have not ended.",
    "thinking_groups": "Controlled requests with a script that computes.",
}

CARRIED = "aici"
"""The key in `kv_connector_stats`."""


@dataclass(slots=True)
class Counts:
    """The scheduler's side: totals since the engine began, and what is alive now."""

    steps: int = 0
    forward_passes: int = 0
    splices: int = 0
    forks: int = 0
    parks: int = 0
    masks_built: int = 0
    masks_reused: int = 0
    sampled_tokens: int = 0
    spliced_tokens: int = 0
    discarded_rows: int = 0
    script_seconds: float = 0.0
    sandbox_seconds: float = 0.0
    sandbox_turns: int = 0
    sandbox_late_turns: int = 0
    sandbox_restarts: int = 0
    live_groups: int = 0
    live_branches: int = 0
    thinking_groups: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    _told: tuple[Any, ...] = (0,) * (len(COUNTERS) + len(GAUGES))

    def take(self) -> dict[str, Any] | None:
        """What changed since the last call; None when nothing did."""
        now = _read(self)
        if now == self._told and not self.ended:
            return None
        changes = zip(COUNTERS, now, self._told, strict=False)
        taken = {
            "counters": {name: new - old for name, new, old in changes if new != old},
            "ended": dict(self.ended),
            "gauges": dict(zip(GAUGES, now[len(COUNTERS) :], strict=True)),
        }
        self._told = now
        self.ended.clear()
        return taken


_read = attrgetter(*COUNTERS, *GAUGES)


def put_counts(stats: SchedulerStats, counts: Counts) -> None:
    """Send what changed with these stats. Not for an engine with a KV connector, which fills the place."""
    taken = counts.take()
    if taken is not None:
        stats.kv_connector_stats = {CARRIED: taken}


def take_counts(stats: SchedulerStats) -> dict[str, Any] | None:
    """What the scheduler sent, if anything; nobody after us sees it."""
    carried = stats.kv_connector_stats
    if carried is None or CARRIED not in carried:
        return None
    stats.kv_connector_stats = None
    taken: dict[str, Any] = carried[CARRIED]
    return taken


class ControllerMetrics(AggregateStatLoggerBase):
    """The front-end's side: Prometheus metrics, labelled as vLLM labels its own.

    Args:
        vllm_config: names the model.
        engine_indexes: the data-parallel engines that this front-end hears from.
        beside: vLLM's own logger, whose kinds of metrics are used: they differ under Ray.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        beside: type[PrometheusStatLogger] = PrometheusStatLogger,
    ):
        model = vllm_config.model_config.served_model_name
        self._labels = {index: (model, str(index)) for index in engine_indexes}
        labels = ["model_name", "engine"]
        counter, gauge = beside._counter_cls, beside._gauge_cls
        self._counters = {
            name: counter(name=PREFIX + name, documentation=text, labelnames=labels)
            for name, text in COUNTERS.items()
        }
        self._gauges = {
            name: gauge(
                name=PREFIX + name, documentation=text, labelnames=labels, multiprocess_mode="mostrecent"
            )
            for name, text in GAUGES.items()
        }
        self._ended = counter(
            name=PREFIX + ENDED, documentation=ENDED_HELP, labelnames=[*labels, "finish_reason"]
        )
        for metric in [*self._counters.values(), *self._gauges.values()]:
            for values in self._labels.values():
                metric.labels(*values)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        taken = take_counts(scheduler_stats) if scheduler_stats is not None else None
        if taken is None:
            return
        labels = self._labels[engine_idx]
        for name, change in taken["counters"].items():
            self._counters[name].labels(*labels).inc(change)
        for reason, change in taken["ended"].items():
            self._ended.labels(*labels, reason).inc(change)
        for name, value in taken["gauges"].items():
            self._gauges[name].labels(*labels).set(value)

    def log_engine_initialized(self) -> None:
        pass
