"""What the clients of controlled requests are sent: tokens that nothing takes back, ends, and results."""

import json
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from aici_vllm.engine.controlled import FINISH, Controlled, ControlledGroup
from aici_vllm.engine.live import LiveViews
from aici_vllm.engine.results import RESULTS_KEY, results


class Outputs:
    """Outputs that wait for the step's end, in the order in which they were made.

    Its length is how many wait.

    Args:
        eos_token_id: the token that stands for text in a stream that has none.
        live_views: the requests whose clients watch.
    """

    def __init__(self, eos_token_id: int, live_views: LiveViews):
        self._eos_token_id = eos_token_id
        self._live_views = live_views
        self._waiting: list[tuple[int, EngineCoreOutput]] = []
        self._prompt_logprobs: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> list[tuple[int, EngineCoreOutput]]:
        """Everything that waits, each output beside the number of its client."""
        taken, self._waiting = self._waiting, []
        return taken

    def take_all(self) -> list[tuple[int, EngineCoreOutput]]:
        """As `take`, and what those who watch are told of the step."""
        return self.take() + self._live_views.outputs()

    def keep_prompt_logprobs(self, request: Request, found: Any) -> None:
        """Send them with the first output of a request."""
        self._prompt_logprobs[request.request_id] = found

    def has_prompt_logprobs(self, request: Request) -> bool:
        """Whether the next output of a request must be made here, since it brings them."""
        return request.request_id in self._prompt_logprobs

    def send_settled(self, member: Controlled) -> None:
        """Send the tokens of a choice that nothing can take back any more."""
        if member.choice and not self._live_views.withholds_tokens(member.group):
            for output in member.settled_outputs():
                self._send(member.request, output)

    def close_choice(self, member: Controlled, found: dict[str, Any] | None = None) -> None:
        """Send a choice's last output; vLLM drops the text of a token that comes with a stop."""
        request, branch = member.request, member.branch
        streamed = member.group.streamed
        # A client's stop was completed by the last token, which must come with the end.
        *earlier, output = member.rest_outputs() or [EngineCoreOutput(request.request_id, [])]
        if streamed and not member.sent:
            # vLLM's servers swallow a stream's end when no token came before it.
            earlier.append(member.eos_output(self._eos_token_id))
        for one in earlier:
            self._send(request, one)
        assert branch.finish_reason is not None
        output.finish_reason = FINISH.get(branch.finish_reason, FinishReason.ABORT)
        output.stop_reason = branch.error if branch.stopped_by is None else branch.stopped_by.reason
        output.kv_transfer_params = found
        output.trace_headers = request.trace_headers
        if found is not None and streamed:
            output.stop_reason = json.dumps({RESULTS_KEY: found[RESULTS_KEY]})
        self._send(request, output)

    def close_group(self, group: ControlledGroup) -> None:
        """End the choices that no branch has taken, and the first one, with the results."""
        for request in group.seats.values():
            self._send(request, EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.STOP))
        self.close_choice(group.root, {**self._live_views.events(group), RESULTS_KEY: results(group)})

    def forget(self, group: ControlledGroup) -> None:
        """The request is over."""
        for request in [*group.seats.values(), *(member.request for member in group.members.values())]:
            self._prompt_logprobs.pop(request.request_id, None)

    def _send(self, request: Request, output: EngineCoreOutput) -> None:
        if output.new_token_ids:
            output.events = request.take_events()
            output.prefill_stats = request.take_prefill_stats()
        output.new_prompt_logprobs_tensors = self._prompt_logprobs.pop(request.request_id, None)
        self._waiting.append((request.client_index, output))


def put_first(outputs: dict[int, EngineCoreOutputs], added: list[tuple[int, EngineCoreOutput]]) -> None:
    """Put outputs before those that each client gets from vLLM."""
    for client_index, output in reversed(added):
        outputs.setdefault(client_index, EngineCoreOutputs(outputs=[])).outputs.insert(0, output)


def put_last(outputs: dict[int, EngineCoreOutputs], added: list[tuple[int, EngineCoreOutput]]) -> None:
    """Put outputs behind those that each client gets from vLLM."""
    for client_index, output in added:
        outputs.setdefault(client_index, EngineCoreOutputs(outputs=[])).outputs.append(output)
