"""What a watching client is told survives vLLM's merging of outputs; what the routes lean on exists."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.sequence import Sequence
from aici_vllm.engine import compat, live
from aici_vllm.engine.controlled import ControlledGroup
from tests.controller.native import group_of


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestOutput, "add", inspect.unwrap(RequestOutput.add))
    compat.keep_merged_lists("events")
    compat.keep_merged_lists("events")


def output(told: dict[str, Any] | None) -> RequestOutput:
    one = CompletionOutput(0, "", [], None, None)
    return RequestOutput("id", None, [1], None, [one], finished=False, kv_transfer_params=told)


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"events": [1]}, {"events": [2, 3]}, {"events": [1, 2, 3]}),
        ({"events": [1]}, None, {"events": [1]}),
        ({"events": [1]}, {"controller": "x"}, {"controller": "x", "events": [1]}),
        (None, {"events": [1]}, {"events": [1]}),
        (None, None, None),
        ({"other": 1}, {"other": 2}, {"other": 2}),
        ({"other": 1}, None, None),
    ],
)
def test_merged_outputs_keep_every_event(first: Any, second: Any, merged: Any, aggregate: bool) -> None:
    merging = output(first)
    merging.add(output(second), aggregate)
    assert merging.kv_transfer_params == merged


def test_three_outputs_merge_in_order() -> None:
    merging = output({"events": [1]})
    for number in (2, 3):
        merging.add(output({"events": [number]}), True)
    assert merging.kv_transfer_params == {"events": [1, 2, 3]}


def test_what_the_routes_lean_on_exists() -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from aici_vllm.server.plugin import ControllerEndpoints

    assert inspect.iscoroutinefunction(OpenAIServingCompletion.render_completion_request)
    assert inspect.iscoroutinefunction(OpenAIServingChat.render_chat_request)
    assert callable(OpenAIServingModels.model_name)
    assert "self.output.add(output" in inspect.getsource(RequestOutputCollector.put)
    assert isinstance(ControllerEndpoints(), EndpointPlugin)


def test_each_branch_is_told_with_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of()
    group.branches.append(Branch(group, 1, Sequence([1])))
    members = {branch.index: SimpleNamespace(branch=branch) for branch in group.branches}
    monkeypatch.setattr(live, "usage", lambda members: len(members))
    view = live.LiveView(cast(ControlledGroup, SimpleNamespace(group=group, members=members)))
    for writer, value in (0, b"a"), (1, b"b"), (0, b"c"):
        group.variables.set("v", value, writer)
    told = view.take()
    assert told is not None
    assert [fork["storage"] for fork in told["forks"]] == [
        [["v", b"a", "Set"], ["v", b"c", "Set"]],
        [["v", b"b", "Set"]],
    ]
    assert view.take() is None
