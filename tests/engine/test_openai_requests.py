"""OpenAI requests with a controller are checked before a stream has its status line."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from aici_vllm.engine import admission, compat
from tests.engine.test_admission_names import SCRIPT, config

Request = CompletionRequest | ChatCompletionRequest


def completion(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "P", "stream": True, **more})


def chat(**more: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return ChatCompletionRequest.model_validate({"model": "m", "messages": messages, "stream": True, **more})


def render(
    monkeypatch: pytest.MonkeyPatch,
    request: Request,
    check: compat.CheckArguments = admission.checked_arguments,
) -> Any:
    """What a server of vLLM's does before it answers a request; it renders `"rendered"`."""

    class Server:
        engine_client = SimpleNamespace(vllm_config=config())

        async def render(self, request: Request) -> str:
            if isinstance(request, ChatCompletionRequest) and request.tool_choice == "required":
                # As vLLM does it with a tool choice.
                request.structured_outputs = completion(structured_outputs={"json": {}}).structured_outputs
            return "rendered"

    module = ModuleType("a_server_of_vllms")
    module.Server = Server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(compat, "_RENDERERS", {module.__name__: ("Server", "render")})
    compat.check_openai_requests_with(admission.has_controller, check)
    return asyncio.run(Server().render(request))


CONTROLLED = {"vllm_xargs": {"controller": SCRIPT}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"vllm_xargs": {"controller": "def f(:\n"}}, "line 1"),
        ({"vllm_xargs": {"controller": SCRIPT, "controller_checkpoint": ""}}, "1 to 200 characters"),
        ({**CONTROLLED, "structured_outputs": {"regex": "a"}}, "structured outputs"),
        ({**CONTROLLED, "response_format": {"type": "json_object"}}, "structured outputs"),
        ({**CONTROLLED, "stop": "a" * 4097}, "1 of 4097"),
        ({**CONTROLLED, "use_beam_search": True, "n": 2}, "beam search runs no controller"),
    ],
)
def test_what_is_wrong_is_told_before_the_stream(
    monkeypatch: pytest.MonkeyPatch, make: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(VLLMValidationError, match=said):
        render(monkeypatch, make(**more))


def test_a_tool_choice_is_a_structured_output(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = chat(**CONTROLLED, tools=[TOOL], tool_choice="required")
    with pytest.raises(VLLMValidationError, match="structured outputs"):
        render(monkeypatch, asked)


@pytest.mark.parametrize("make", [completion, chat])
def test_a_stored_name_goes_on_as_its_text(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(admission, "_resolve", {"tag": SCRIPT}.__getitem__)
    request = make(vllm_xargs={"controller": "tag", "controller_arg": "x", "session_id": "s"})
    assert render(monkeypatch, request) == "rendered"
    assert request.vllm_xargs == {"controller": SCRIPT, "controller_arg": "x", "session_id": "s"}


@pytest.mark.parametrize("more", [{}, {"vllm_xargs": {"session_id": "s"}}, {"use_beam_search": True}])
def test_plain_requests_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    def check(vllm_config: Any, params: Any) -> dict[str, Any]:
        raise AssertionError("a plain request was checked")

    assert render(monkeypatch, completion(**more), check) == "rendered"


def test_scripts_are_parsed_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def check(vllm_config: Any, params: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return dict(params.extra_args)

    render(monkeypatch, completion(**CONTROLLED), check)
    assert threads != [] and threading.main_thread() not in threads
