"""The scripted model."""

from __future__ import annotations

import pytest

from aici_vllm.agents import AIMessage, Reply, ScriptedModel, ScriptExhausted, UserMessage


def test_replies_in_order_and_n_at_once() -> None:
    model = ScriptedModel(["a", Reply("b", -1.0), "c"])
    prompt = [UserMessage("u")]
    first = model(prompt, no_system_message=True)
    assert first == [UserMessage("u"), AIMessage("a")]
    assert [message.content for message in model(prompt, api_kwargs={"n": 2})][2:] == ["b", "c"]
    assert [len(call.prompt) for call in model.calls] == [1, 2]
    assert model.calls[1].kwargs == {"api_kwargs": {"n": 2}}


def test_a_function_as_script() -> None:
    model = ScriptedModel(lambda prompt: f"{len(prompt)} messages")
    assert model([UserMessage("u")])[-1].content == "2 messages"


def test_exceptions_take_their_turn() -> None:
    model = ScriptedModel(["a", ConnectionError("down"), "b"])
    assert model([])[-1].content == "a"
    with pytest.raises(ConnectionError):
        model([])
    assert model([])[-1].content == "b"
    with pytest.raises(ScriptExhausted, match="request 4"):
        model([])


def test_embeddings() -> None:
    with pytest.raises(ScriptExhausted):
        ScriptedModel([]).embed(["a"])
    assert ScriptedModel([], embedding=lambda text: [1.0]).embed(["a", "b"]) == [[1.0], [1.0]]
