"""Lazy calls: construction, runs, sampling parameters, the tree they grow, failures."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from aici_vllm.agents import (
    AICall,
    AIClassify,
    AIEmbed,
    AIExtract,
    AIGenerate,
    AIMessage,
    AIScan,
    AITemplate,
    Conversation,
    DataMessage,
    RetryConfig,
    SampleRound,
    ScriptedModel,
    SystemMessage,
    TemplateNotFound,
    UserMessage,
    aigenerate,
    attach_replies,
    extract_config,
    is_valid,
    render,
    run,
    unwrap_aicall_args,
)
from aici_vllm.agents.models.base import Reply


class Recorder:
    """A model function that numbers its replies and keeps every call's arguments."""

    def __init__(self, *failures: int) -> None:
        self.failures = failures
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Conversation:
        self.calls.append((args, kwargs))
        number = len(self.calls)
        if number in self.failures:
            raise ConnectionError(f"call {number}")
        n = kwargs["api_kwargs"].get("n", 1)
        return attach_replies(render(args[-1], kwargs), [Reply(f"reply {number}.{i}") for i in range(n)])

    def temperatures(self) -> list[float]:
        return [kwargs["api_kwargs"]["temperature"] for _, kwargs in self.calls]


# Construction


def test_nothing_runs_at_construction() -> None:
    model = Recorder()
    call = AICall(model, "Hi {{name}}", name="Bob", model="m")
    assert model.calls == []
    assert call.conversation == [UserMessage("Hi {{name}}")]
    assert call.kwargs == {"name": "Bob", "model": "m"}
    assert (call.success, call.error, call.active_sample_id, call.memory) == (None, None, -1, {})
    assert call.config == RetryConfig()
    assert call.samples.success is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AIGenerate, "aigenerate"),
        (AIExtract, "aiextract"),
        (AIEmbed, "aiembed"),
        (AIClassify, "aiclassify"),
        (AIScan, "aiscan"),
    ],
)
def test_lazy_kinds(kind: type[AICall], name: str) -> None:
    call = kind("x", a=1)
    assert isinstance(call, AICall)
    assert call.func.__name__ == name
    assert str(call) == f"AICall{{{name}}}(Messages: 1, Success: None)"


def test_prompts() -> None:
    model = ScriptedModel([])
    messages: Conversation = [UserMessage("a")]
    assert unwrap_aicall_args(()) == (None, [])
    schema, conversation = unwrap_aicall_args((model, messages))
    assert schema is model
    assert conversation is messages
    assert unwrap_aicall_args((messages, model))[1] is messages
    assert unwrap_aicall_args(("a",)) == (None, [UserMessage("a")])
    template = unwrap_aicall_args((AITemplate("BlankSystemUser"),))[1]
    assert template == [SystemMessage("{{system}}"), UserMessage("{{user}}")]


@pytest.mark.parametrize(
    "args", [(UserMessage("a"),), (3,), ("a", "b"), ([1],), ("a", [UserMessage("b")]), (("a",),)]
)
def test_invalid_arguments(args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="Invalid argument type"):
        AICall(aigenerate, *args)


def test_more_errors_at_construction() -> None:
    with pytest.raises(ValueError, match="at most"):
        AICall(aigenerate, "a", "b", "c")
    with pytest.raises(TemplateNotFound):
        AIGenerate(AITemplate("Nope"))
    with pytest.raises(TypeError, match="function"):
        AICall("aigenerate")  # type: ignore[arg-type]


def test_extract_config() -> None:
    default, given = RetryConfig(), RetryConfig(n_samples=2)
    rest, config = extract_config({"a": 1, "config": given}, default)
    assert rest == {"a": 1}
    assert config is given
    rest, config = extract_config({"config": "mine"}, default)
    assert rest == {"config": "mine"}
    assert config is default


# Runs


def test_the_first_run() -> None:
    model = Recorder()
    call = AICall(model, "Hi {{name}}", name="Bob", other=1)
    assert run(call) is call
    (args, kwargs) = model.calls[0]
    assert args == ([UserMessage("Hi {{name}}")],)
    assert kwargs == {"name": "Bob", "other": 1, "api_kwargs": {"temperature": 0.701}, "return_all": True}
    assert [message.content for message in call.conversation] == [
        "Act as a helpful AI assistant",
        "Hi Bob",
        "reply 1.0",
    ]
    assert call.success is True
    assert is_valid(call)
    assert call.is_valid
    assert call.kwargs == {"other": 1}
    assert call.config.calls == 1
    (node,) = call.samples.children
    assert node.data is call.conversation
    assert call.active_sample_id == node.id
    assert call.samples.data == call.conversation[:-1]
    assert (call.samples.success, call.samples.visits) == (None, 0)


def test_the_schema_comes_first() -> None:
    schema = ScriptedModel([])
    model = Recorder()
    run(AICall(model, schema, "x"))
    assert model.calls[0][0] == (schema, [UserMessage("x")])


def test_samples_of_a_run_are_siblings_from_one_snapshot() -> None:
    model = Recorder()
    call = AICall(model, "x", config=RetryConfig(n_samples=3))
    run(call)
    assert [args[-1] for args, _ in model.calls] == [[UserMessage("x")]] * 3
    assert [node.data[-1].content for node in call.samples.children] == [
        "reply 1.0",
        "reply 2.0",
        "reply 3.0",
    ]
    assert call.active_sample_id == call.samples.children[-1].id
    run(call)
    assert len(call.samples.children) == 3
    assert len(call.samples.children[-1].children) == 3
    assert all(len(args[-1]) == 3 for args, _ in model.calls[3:])


def test_temperature_grows_per_request_and_restarts_per_run() -> None:
    model = Recorder()
    call = AICall(model, "x", config=RetryConfig(n_samples=3))
    run(run(call))
    assert model.temperatures() == [0.701, 0.702, 0.703] * 2


def test_temperature_zero_stays() -> None:
    model = Recorder()
    run(AICall(model, "x", config=RetryConfig(n_samples=2, temperature=0)))
    assert model.temperatures() == [0, 0]


def test_the_users_temperature_wins() -> None:
    model = Recorder()
    call = AICall(model, "x", api_kwargs={"temperature": 0.1, "top_p": 0.5, "seed": 1})
    run(call)
    run(call, api_kwargs={"top_p": 0.9})
    assert model.calls[0][1]["api_kwargs"] == {"temperature": 0.1, "top_p": 0.5, "seed": 1}
    assert model.calls[1][1]["api_kwargs"] == {"temperature": 0.1, "top_p": 0.9, "seed": 1}
    run(call, api_kwargs={"temperature": 0.3})
    assert model.temperatures()[-1] == 0.3


def test_arguments_of_the_run_win() -> None:
    model = Recorder()
    call = AICall(model, "x", a=1, b=2)
    run(call, b=3, c=4)
    kwargs = model.calls[0][1]
    assert {name: kwargs[name] for name in "abc"} == {"a": 1, "b": 3, "c": 4}
    assert call.kwargs == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("n_samples", "n", "requests", "samples"), [(3, 2, 2, 4), (2, 2, 1, 2), (1, 3, 1, 3), (5, 1, 5, 5)]
)
def test_n_samples_and_api_n(n_samples: int, n: int, requests: int, samples: int) -> None:
    model = Recorder()
    call = AICall(model, "x", api_kwargs={"n": n}, config=RetryConfig(n_samples=n_samples))
    run(call)
    assert len(model.calls) == requests
    assert len(call.samples.children) == call.config.calls == samples
    assert all(len(node.data) == 3 for node in call.samples.children)


def test_max_calls_is_checked_before_each_request(caplog: pytest.LogCaptureFixture) -> None:
    model = Recorder()
    call = AICall(model, "x", api_kwargs={"n": 2}, config=RetryConfig(n_samples=10, max_calls=3))
    with caplog.at_level(logging.INFO, logger="aici_vllm.agents"):
        run(call)
    assert (len(model.calls), call.config.calls) == (2, 4)
    assert "Max calls limit reached (calls: 4). Generation interrupted." in caplog.text
    caplog.clear()
    run(call, verbose=0)
    assert len(model.calls) == 2
    assert caplog.text == ""


def test_a_quiet_call_makes_its_runs_quiet(caplog: pytest.LogCaptureFixture) -> None:
    call = AICall(Recorder(), "x", verbose=False, config=RetryConfig(n_samples=2, max_calls=1))
    with caplog.at_level(logging.INFO, logger="aici_vllm.agents"):
        run(call, verbose=2)
    assert caplog.text == ""


def test_an_error_is_raised_and_recorded() -> None:
    call = AICall(Recorder(2), "x", config=RetryConfig(n_samples=3))
    with pytest.raises(ConnectionError, match="call 2"):
        run(call)
    assert call.success is False
    assert isinstance(call.error, ConnectionError)
    assert call.config.calls == 1
    (node,) = call.samples.children
    assert call.active_sample_id == node.id
    # The conversation is still the prompt; the sample is in the tree.
    assert call.conversation == [UserMessage("x")]
    assert call.samples.data == [UserMessage("x")]


def test_a_caught_error_ends_the_round() -> None:
    model = Recorder(2)
    call = AICall(model, "x {{a}}", a=1, config=RetryConfig(n_samples=3, catch_errors=True))
    run(call)
    assert len(model.calls) == 2
    assert call.success is False
    assert call.kwargs == {"a": 1}
    run(call)
    assert call.success is True
    assert isinstance(call.error, ConnectionError)
    with pytest.raises(ConnectionError):
        run(AICall(Recorder(1), "x", config=RetryConfig(catch_errors=True)), catch_errors=False)


def test_the_prompt_survives_a_first_call_that_fails() -> None:
    model = Recorder(1)
    call = AICall(model)
    with pytest.raises(ConnectionError):
        call("the prompt")
    assert call.samples.data == [UserMessage("the prompt")]
    run(call)
    assert model.calls[1][0] == ([UserMessage("the prompt")],)
    assert call.samples.data == call.conversation[:-1]


def test_an_interrupt_is_not_caught() -> None:
    def interrupted(conversation: Conversation, **kwargs: Any) -> Conversation:
        raise KeyboardInterrupt

    call = AICall(interrupted, "x", config=RetryConfig(catch_errors=True))
    with pytest.raises(KeyboardInterrupt):
        run(call)
    assert call.success is False
    assert call.error is None


def test_a_function_cannot_change_the_conversation_it_is_given() -> None:
    def careless(conversation: Conversation, **kwargs: Any) -> Conversation:
        conversation.append(AIMessage("reply"))
        return conversation

    call = AICall(careless, "x", config=RetryConfig(n_samples=2))
    run(call)
    assert [len(node.data) for node in call.samples.children] == [2, 2]


@pytest.mark.parametrize("result", [None, "text", [1], AIMessage("x")])
def test_a_function_must_return_a_conversation(result: Any) -> None:
    call = AICall(lambda conversation, **kwargs: result, "x")
    with pytest.raises(TypeError, match="whole conversation"):
        run(call)
    assert call.success is False


def test_an_asynchronous_function_is_refused() -> None:
    async def model(conversation: Conversation, **kwargs: Any) -> Conversation:
        return conversation

    with pytest.raises(TypeError, match="run_async"):
        run(AICall(model, "x"))


def test_run_refuses_return_all_false_and_other_things() -> None:
    with pytest.raises(ValueError, match="return_all"):
        run(AICall(Recorder(), "x"), return_all=False)
    with pytest.raises(TypeError, match="lazy call"):
        run("x")  # type: ignore[type-var]


def test_a_call_continues_a_conversation() -> None:
    call = AICall(Recorder(), "one")
    run(call)
    first = call.samples.children[0]
    assert call("two") is call
    assert [message.content for message in call.conversation][1:] == ["one", "reply 1.0", "two", "reply 2.0"]
    assert first.data[-1] == UserMessage("two")
    assert call.samples.children[0].children[0].data is call.conversation
    call(UserMessage("three"))
    assert len(call.conversation) == 7
    with pytest.raises(TypeError):
        call(3)  # type: ignore[arg-type]


def test_data_messages_are_one_sample() -> None:
    def extracting(conversation: Conversation, **kwargs: Any) -> Conversation:
        return [*conversation, DataMessage(1, 5, 1), DataMessage(2, 5, 2)]

    call = AICall(extracting, "x")
    run(call)
    assert len(call.samples.children) == 1


# Samplers


class TwoAtOnce:
    """A sampler that makes all samples from one call, as branches of one request would be."""

    def __init__(self) -> None:
        self.rounds: list[SampleRound] = []

    def sample(self, round: SampleRound) -> Iterator[Conversation]:
        self.rounds.append(round)
        for number in range(round.n_samples):
            yield [*round.conversation, AIMessage(f"branch {number}")]


def test_a_sampler_replaces_the_calls() -> None:
    model, sampler = Recorder(), TwoAtOnce()
    call = AICall(model, "x", sampler=sampler, config=RetryConfig(n_samples=2), seed=1)
    run(call)
    assert model.calls == []
    assert "sampler" not in call.kwargs
    assert [node.data[-1].content for node in call.samples.children] == ["branch 0", "branch 1"]
    (round,) = sampler.rounds
    assert (round.parent, round.n_samples, round.calls_left) == (call.samples, 2, 99)
    assert round.kwargs == {"seed": 1}
    assert round.condition is None
    other = TwoAtOnce()
    run(call, sampler=other)
    assert len(other.rounds) == 1
    assert other.rounds[0].parent is call.samples.children[-1]
    assert call.config.calls == 4


# Copies and strings


def test_copy() -> None:
    call = AICall(Recorder(), "x", a=1)
    run(call)
    call.memory["k"] = [1]
    twin = copy.copy(call)
    assert type(twin) is AICall
    assert twin == call
    assert twin.samples is not call.samples
    assert twin.config is not call.config
    assert twin.conversation is not call.conversation
    assert twin.conversation[0] is call.conversation[0]
    assert twin.memory["k"] is call.memory["k"]
    assert twin.samples[twin.active_sample_id].data is twin.conversation  # type: ignore[union-attr]
    twin("more")
    assert len(call.conversation) == 3
    assert len(call.samples) == 2
    assert twin != call
    assert call != "x"


def test_string_form_with_preview() -> None:
    call = AICall(lambda conversation, **kwargs: [*conversation, AIMessage("a" * 150)], "x")
    run(call)
    name = call.func.__name__
    assert str(call) == (
        f"AICall{{{name}}}(Messages: 2, Success: True)\n"
        "- Preview of the Latest AIMessage (see property `:conversation`):\n " + "a" * 100
    )
