"""`POST /v1/run`: events as specified, refusals before anything runs, failures while it does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from aici_vllm.server.protocol import Run
from tests.server.conftest import SCRIPT, USAGE, FakeFront, Served, fork, step


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must be whole: each a line of data and an empty line, `[DONE]` last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block[len("data: ") :]) for block in blocks[:-2]]


def test_a_run_is_told_step_by_step(served: Served) -> None:
    first, *steps = events(served.run())
    assert first["object"] == "initial-run" and first["id"].startswith("run-") and first["model"] == "m"
    assert [event["object"] for event in steps] == ["run"] * 3
    assert [event["forks"][0]["text"] for event in steps] == ["Hello", " you", ""]
    assert [event["forks"][0].get("finish_reason") for event in steps] == [None, None, "aici-stop"]
    assert "finish_reason" not in steps[0]["forks"][0]
    assert steps[1]["forks"][0]["logs"] == "GEN: ' you'\n"
    assert steps[1]["forks"][0]["parts"] == [{"kind": "sampled", "text": " you"}]
    assert steps[1]["usage"] == {
        "sampled_tokens": 2,
        "ff_tokens": 5,
        "cost": 9,
        "spliced_tokens": 3,
        "forward_passes": 2,
        "discarded_rows": 0,
    }
    assert steps[-1]["results"] == {"branches": [], "usage": USAGE}
    assert all("results" not in event for event in steps[:-1])


def test_text_that_is_taken_back_is_told(served: Served) -> None:
    served.front.outputs = [
        [step(fork(0, ("spliced", "grüße".encode()), ("sampled", b"ab")))],
        [step(fork(0, ("taken_back", b"xxxx"), ("spliced", b"n")))],
    ]
    _, first, second = events(served.run())
    assert first["forks"][0]["text"] == "grüßeab"
    # "e", "a", "b" and the second byte of "ß", which goes as a whole.
    assert second["forks"][0]["parts"][0] == {"kind": "taken_back", "text": "ßeab"}
    assert second["forks"][0]["text"].startswith(" ↩ ")


def test_several_steps_in_one_output_stay_several_events(served: Served) -> None:
    served.front.outputs = [[step(fork(0, ("sampled", b"a"))), step(fork(1, ("sampled", b"b")))]]
    told = events(served.run())[1:]
    assert [event["forks"][0]["index"] for event in told] == [0, 1]
    assert [("results" in event) for event in told] == [False, True]


def test_variables_and_errors_are_told(served: Served) -> None:
    writes = [["a", b"\xff", "Set"], ["a", b"1", "Append"]]
    served.front.outputs = [
        [step(fork(0, storage=writes, finish_reason="fail", error="ValueError: no", logs="trace"))]
    ]
    (told,) = events(served.run())[1:]
    (branch,) = told["forks"]
    assert branch["storage"] == [
        {"WriteVar": {"name": "a", "value": "ff", "op": "Set", "when_version_is": None}},
        {"WriteVar": {"name": "a", "value": "31", "op": "Append", "when_version_is": None}},
    ]
    assert (branch["finish_reason"], branch["error"], branch["logs"]) == ("fail", "ValueError: no", "trace")


@pytest.mark.parametrize("reason", ["length", "deadlock", "abort"])
def test_other_ends_keep_their_names(served: Served, reason: str) -> None:
    served.front.outputs = [[step(fork(0, finish_reason=reason, error=None))]]
    assert events(served.run())[-1]["forks"][0]["finish_reason"] == reason


def test_half_a_character_at_the_end_is_shown_as_such(served: Served) -> None:
    served.front.outputs = [[step(fork(0, ("sampled", b"a\xc3")))], [step(fork(0, finish_reason="stop"))]]
    assert [event["forks"][0]["text"] for event in events(served.run())[1:]] == ["a", "\ufffd"]


def test_none_is_plain_generation_from_the_argument(served: Served) -> None:
    told = events(served.run("none", controller_arg="abc", max_tokens=5))[1:]
    assert [event["forks"][0]["text"] for event in told] == ["x", "x", "x"]
    assert told[-1]["forks"][0]["finish_reason"] == "eos"
    assert told[-1]["usage"]["sampled_tokens"] == 3 and told[-1]["usage"]["ff_tokens"] == 3 + 2
    rendered, params, _ = served.front.asked[0]
    assert rendered.prompt == {"prompt_token_ids": list(b"abc")}
    assert params.extra_args is None and params.max_tokens == 5


def asked(front: FakeFront) -> dict[str, Any]:
    extra: dict[str, Any] = front.asked[-1][1].extra_args
    return extra


def test_what_a_controller_can_be(served: Served) -> None:
    module_id = served.upload().json()["module_id"]
    served.tag(module_id, "hello")
    for controller in (module_id, "hello", SCRIPT):
        events(served.run(controller, controller_arg="x"))
        assert (asked(served.front)["controller"], asked(served.front)["controller_arg"]) == (SCRIPT, "x")
    events(served.run("greet"))
    assert asked(served.front)["controller"] == "greet", "the engine knows what is installed"
    for name in ("pyctrl", "gh:microsoft/aici/pyctrl", "gh:microsoft/aici/pyctrl/v0.1"):
        events(served.run(name, controller_arg=SCRIPT))
        assert (asked(served.front)["controller"], asked(served.front)["controller_arg"]) == (SCRIPT, "")


def test_an_argument_that_is_no_string_arrives_as_json(served: Served) -> None:
    events(served.run("greet", controller_arg={"a": [1, None]}))
    assert json.loads(asked(served.front)["controller_arg"]) == {"a": [1, None]}


def test_messages_take_the_place_of_the_prompt(served: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    events(served.run("greet", messages=messages))
    assert served.front.asked[0][0].prompt["prompt_token_ids"] == list(repr(messages).encode())


def test_max_tokens_is_what_the_context_has_room_for(served: Served) -> None:
    events(served.run("greet", prompt="abc"))
    assert served.front.asked[0][1].max_tokens == 97


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"controller": "unknown"}, "unknown controller"),
        ({"controller": "0" * 64}, "no controller 0000"),
        ({"controller": "gh:some/body"}, "upload the script"),
        ({"controller": "def f(:\n"}, "line 1"),
        ({"controller": ""}, "controller"),
        ({}, "controller"),
        ({"controller": "greet", "temperature": -1}, "temperature"),
        ({"controller": "greet", "temperature": 1, "top_p": 0}, "top_p"),
        ({"controller": "greet", "temperature": 1, "top_p": 1.1}, "top_p"),
        ({"controller": "greet", "temperature": 1, "top_k": 0}, "top_k"),
        ({"controller": "greet", "temperature": 1, "top_k": -2}, "top_k"),
        ({"controller": "greet", "temperature": 1, "top_k": 2**64}, "top_k"),
        ({"controller": "greet", "top_p": 0.5}, "temperature 0"),
        ({"controller": "greet", "top_k": 5}, "temperature 0"),
        ({"controller": "greet", "max_tokens": 0}, "max_tokens"),
        ({"controller": "greet", "prompt": "abc", "max_tokens": 98}, "room for 97"),
        ({"controller": "greet", "prompt": "a" * 200}, "room"),
        ({"controller": "greet", "prompt": "a", "messages": []}, "not both"),
        ({"controller": "greet", "model": "other"}, "no model"),
        ({"controller": "greet", "tempreature": 1}, "tempreature"),
        ({"controller": "greet", "prompt": 5}, "prompt"),
    ],
)
def test_what_is_wrong_is_a_400_before_anything_runs(served: Served, body: dict[str, Any], said: str) -> None:
    answer = served.http.post("/v1/run", json=body)
    assert answer.status_code == 400, answer.text
    assert said in str(answer.json()["error"])
    assert served.front.asked == []


def test_scripts_are_parsed_beside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bool] = []
    admit = served.front.admit

    def admit_noting_where(rendered: Any, params: Any) -> Any:
        try:
            asyncio.get_running_loop()
            parsed.append(True)
        except RuntimeError:
            parsed.append(False)
        return admit(rendered, params)

    monkeypatch.setattr(served.front, "admit", admit_noting_where)
    events(served.run())
    assert parsed == [False]


def test_a_failure_of_the_engine_is_the_streams_last_word(served: Served) -> None:
    served.front.failure = RuntimeError("the engine died")
    told = events(served.run())
    assert told[-1] == {
        "error": {"message": "the engine died", "type": "RuntimeError", "param": None, "code": 500}
    }


def test_a_client_that_leaves_ends_its_run(served: Served) -> None:
    served.front.endless = True

    async def leave_after_the_last_step() -> bool:
        body = json.dumps({"controller": SCRIPT}).encode()
        request = [{"type": "http.request", "body": body, "more_body": False}]
        seen, told = asyncio.Event(), b""

        async def receive() -> dict[str, Any]:
            if request:
                return request.pop()
            await seen.wait()
            return {"type": "http.disconnect"}

        async def send(part: dict[str, Any]) -> None:
            nonlocal told
            told += part.get("body", b"")
            if b"aici-stop" in told:
                seen.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/run", "query_string": b"", "headers": headers}
        await asyncio.wait_for(served.app(scope, receive, send), 30)  # type: ignore[arg-type]
        return served.front.left.is_set()

    assert asyncio.run(leave_after_the_last_step())


def test_every_event_fits_the_openapi_page(served: Served) -> None:
    for event in events(served.run())[1:]:
        Run.model_validate(event)
