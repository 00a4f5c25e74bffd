"""How replies become messages."""

from __future__ import annotations

import random

import pytest

from aici_vllm.agents import AIMessage, Reply, SystemMessage, UserMessage, attach_replies
from aici_vllm.agents.models.base import chat_dicts, prepare_request


def test_one_reply_has_no_sample_id() -> None:
    conversation = attach_replies([UserMessage("u")], [Reply("a", -1.0, "stop", (3, 4))])
    message = conversation[-1]
    assert isinstance(message, AIMessage)
    assert message == AIMessage("a", None, None, -1.0, "stop", (3, 4))
    assert message.run_id is not None


def test_several_replies_share_a_run_and_are_numbered() -> None:
    replies = attach_replies([], [Reply("a"), Reply("b"), Reply("c")])
    assert [message.sample_id for message in replies] == [1, 2, 3]  # type: ignore[union-attr]
    assert len({message.run_id for message in replies}) == 1  # type: ignore[union-attr]


def test_replies_with_log_probabilities_are_sorted_best_last() -> None:
    replies = attach_replies([], [Reply("a", -1.0), Reply("b", -3.0), Reply("c", -2.0)])
    assert [(message.content, message.sample_id) for message in replies] == [("b", 2), ("c", 3), ("a", 1)]  # type: ignore[union-attr]
    replies = attach_replies([], [Reply("a", -1.0), Reply("b")])
    assert [message.content for message in replies] == ["a", "b"]


def test_run_ids_come_from_the_rng() -> None:
    first, again, other = (attach_replies([], [Reply("a")], random.Random(seed)) for seed in (1, 1, 2))
    assert first[0].run_id == again[0].run_id != other[0].run_id  # type: ignore[union-attr]


def test_chat_format() -> None:
    prompt = [SystemMessage("s"), UserMessage("u"), AIMessage("a"), UserMessage("v", images=("data:x",))]
    assert chat_dicts(prompt) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "v"},
                {"type": "image_url", "image_url": {"url": "data:x"}},
            ],
        },
    ]


def test_requests() -> None:
    request = prepare_request([UserMessage("{{a}}")], {"a": 1, "api_kwargs": {"n": 3}, "model": "m"})
    assert [message.content for message in request.prompt][1:] == ["1"]
    assert (request.n, request.model, request.http_kwargs) == (3, "m", {})
    assert prepare_request([], {}).n == 1
    with pytest.raises(TypeError, match="name of a model"):
        prepare_request([], {"model": 3})
