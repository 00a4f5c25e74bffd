"""What an operator sees of controllers, told by the scheduler as it happens: counts, log lines, spans."""

from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.v1.metrics.stats import SchedulerStats

from aici_vllm.engine.controlled import Controlled, ControlledGroup
from aici_vllm.engine.metrics import Counts, put_counts
from aici_vllm.engine.request_log import log_request, show_request_log, summary
from aici_vllm.engine.tracing import Tracing

if TYPE_CHECKING:
    from aici_vllm.engine.scheduler import Scheduler


class Telemetry:
    """The scheduler calls one method for each thing that happens.

    Args:
        vllm_config: of the engine.
        log_stats: whether vLLM reports on itself; if not, nobody takes the counts and no log is set up.
    """

    def __init__(self, vllm_config: VllmConfig, log_stats: bool):
        self.counts = Counts()
        self._tracing = Tracing(vllm_config)
        self._has_connector = vllm_config.kv_transfer_config is not None
        if log_stats:
            show_request_log(vllm_config.logging_config)

    def computed(self, branches: int) -> None:
        """A step computes so many controlled branches."""
        self.counts.steps += 1
        self.counts.forward_passes += branches

    def spliced(self, member: Controlled) -> None:
        """A branch's tokens are about to be given to the engine, which holds others or fewer."""
        self.counts.splices += 1
        sequence = member.branch.sequence
        added = len(sequence) - sequence.kept
        self._tracing.event(
            member.group, "splice", branch=member.branch.index, position=sequence.kept, tokens=added
        )

    def forked(self, group: ControlledGroup, parent: int, children: list[int]) -> None:
        """Branch `parent` has become several."""
        self.counts.forks += len(children)
        self._tracing.event(group, "fork", branch=parent, children=children)

    def parked(self, member: Controlled) -> None:
        """A branch left the batch."""
        self.counts.parks += 1
        self._tracing.event(
            member.group, "park", branch=member.branch.index, reason=member.branch.next.name.lower()
        )

    def branch_ended(self, member: Controlled) -> None:
        """A branch has ended, for whatever reason."""
        branch, counts = member.branch, self.counts
        reason = str(branch.finish_reason)
        counts.ended[reason] += 1
        counts.sampled_tokens += branch.sequence.sampled
        counts.spliced_tokens += branch.sequence.spliced
        counts.discarded_rows += member.discarded
        if branch.program is not None:
            counts.script_seconds += branch.program.seconds
        self._tracing.event(member.group, "end", branch=branch.index, finish_reason=reason)

    def ended(self, group: ControlledGroup) -> None:
        """A request is over, results sent or client gone."""
        if 0 not in group.members:
            # The client left before all of its choices had arrived: nothing has run.
            return
        found = summary(group)
        log_request(found)
        self._tracing.end(group, found)

    def report(self, stats: SchedulerStats, scheduler: "Scheduler") -> None:
        """Send the counts of a step that is over with vLLM's own."""
        counts = self.counts
        counts.masks_built = scheduler.masks.built
        counts.masks_reused = scheduler.masks.reused
        scheduler.programs.count(counts)
        counts.live_groups, counts.live_branches, counts.thinking_groups = scheduler.num_live()
        if not self._has_connector:
            put_counts(stats, counts)
