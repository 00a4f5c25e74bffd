"""What a client that watches its request is told after every step: what each branch did in it.

A request asks for it with `controller_live`. Its outputs then carry, under `EVENTS` in
`kv_transfer_params`, a list of events, oldest first; nothing in them is ever taken back or repeated.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreOutput

from aici_vllm.engine.controlled import Controlled, ControlledGroup
from aici_vllm.engine.results import usage

EVENTS = "controller_events"


@dataclass(eq=False)
class LiveView:
    """The branches of one request, and what was told of them."""

    group: ControlledGroup
    told_end: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.group.group.root.sequence.watch()
        self.group.group.variables.watch()

    def take(self) -> dict[str, Any] | None:
        """What happened since the last call; None when nothing did."""
        writes: dict[int, list[list[Any]]] = {}
        for writer, *write in self.group.group.variables.take_writes():
            writes.setdefault(writer, []).append(write)
        members = [self.group.members[index] for index in sorted(self.group.members)]
        forks = [fork for member in members if (fork := self._fork(member, writes)) is not None]
        return {"forks": forks, "usage": usage(members)} if forks else None

    def _fork(self, member: Controlled, writes: dict[int, list[list[Any]]]) -> dict[str, Any] | None:
        branch = member.branch
        if branch.index in self.told_end:
            return None
        fork: dict[str, Any] = {
            "changes": branch.sequence.take_changes(),
            "logs": branch.log.take_new(),
            "storage": writes.get(branch.index, []),
        }
        if not any(fork.values()) and branch.finish_reason is None:
            return None
        if branch.finish_reason is not None:
            self.told_end.add(branch.index)
            fork |= {"finish_reason": branch.finish_reason, "error": branch.error}
        return {"index": branch.index, **fork}


class LiveViews:
    """The requests of an engine whose clients watch.

    Args:
        stream_interval: vLLM's setting; over 1, it drops outputs between those that carry tokens.
    """

    def __init__(self, stream_interval: int):
        self._withholding = stream_interval > 1
        self._views: dict[ControlledGroup, LiveView] = {}

    def watch(self, group: ControlledGroup) -> None:
        """Begin to report on a request that has not started yet."""
        self._views[group] = LiveView(group)

    def forget(self, group: ControlledGroup) -> None:
        """The request is over."""
        self._views.pop(group, None)

    def withholds_tokens(self, group: ControlledGroup) -> bool:
        """Whether its tokens must wait for the end, so that vLLM lets every event through."""
        return self._withholding and group in self._views

    def events(self, group: ControlledGroup) -> dict[str, Any]:
        """The last events of a request, for the `kv_transfer_params` that end it."""
        view = self._views.get(group)
        event = view.take() if view is not None else None
        return {EVENTS: [event]} if event is not None else {}

    def outputs(self) -> list[tuple[int, EngineCoreOutput]]:
        """One output, beside its client's number, for every request in which something happened."""
        outputs = []
        for group in self._views:
            if found := self.events(group):
                request = group.root.request
                output = EngineCoreOutput(request.request_id, [], kv_transfer_params=found)
                output.prefill_stats = request.take_prefill_stats()
                outputs.append((request.client_index, output))
        return outputs
