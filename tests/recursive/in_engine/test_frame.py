"""What stands between messages, read from a template by its own rendering."""

from __future__ import annotations

import asyncio

import pytest

from aici_vllm.recursive.in_engine.errors import EngineCallError
from aici_vllm.recursive.in_engine.frame import ChatFrame, Message, read_frame
from tests.recursive.in_engine.scripted_engine import template

SYSTEM = {"role": "system", "content": "rules"}
USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
NEXT = {"role": "user", "content": "next"}


def frame_of(write: object = template) -> ChatFrame:
    async def render(messages: list[Message]) -> str:
        return str(write(messages))  # type: ignore[operator]

    return asyncio.run(read_frame(render))


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, NEXT]])
def test_pieces_behind_the_head_are_what_the_template_writes(messages: list[Message]) -> None:
    frame = frame_of()
    assert frame.head(messages) + "".join(text for text, _ in frame.pieces(messages)) == template(messages)
    data = [text for text, is_data in frame.pieces(messages) if is_data]
    assert data == [message["content"] for message in messages]


def test_a_continuation_is_what_is_new() -> None:
    frame, seen = frame_of(), [SYSTEM, USER, ASSISTANT]
    assert frame.continuation(seen, [*seen, NEXT]) == [("<end>U:", False), ("next", True), ("<end>A:", False)]
    added = {**ASSISTANT, "content": "hi there"}
    assert frame.continuation(seen, [SYSTEM, USER, added, NEXT])[0] == (" there", True)  # type: ignore[index]


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, USER, ASSISTANT],
        [SYSTEM, NEXT, ASSISTANT, NEXT],
        [SYSTEM, USER, {**ASSISTANT, "content": "other"}, NEXT],
        [SYSTEM, USER, NEXT, NEXT, NEXT],
    ],
)
def test_another_conversation_is_no_continuation(messages: list[Message]) -> None:
    frame = frame_of()
    assert frame.continuation([SYSTEM, USER, ASSISTANT], messages) is None
    assert frame.continuation([], messages) is None


def test_a_template_that_changes_earlier_turns_does_no_harm() -> None:
    def forgetful(messages: list[Message]) -> str:
        shown = [{**m, "content": m["content"].removesuffix("</think>")} for m in messages]
        return template(shown).replace("A:", "A:<think>", 1) if len(messages) == 1 else template(shown)

    frame = frame_of(forgetful)
    assert frame.pieces([USER])[-1] == ("<end>A:<think>", False)
    assert frame.continuation([USER, ASSISTANT], [USER, ASSISTANT, NEXT])[-1] == ("<end>A:<think>", False)  # type: ignore[index]


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    assert frame_of().pieces([{"role": "user", "content": "a\ud800b"}])[0] == ("a?b", True)


@pytest.mark.parametrize(
    "write", [lambda messages: messages[-1]["content"], lambda messages: "", lambda m: template(m) * 2]
)
def test_templates_that_cannot_be_read_are_refused(write: object) -> None:
    with pytest.raises(EngineCallError, match="chat template"):
        frame_of(write)


def test_messages_of_one_role_are_written_as_one() -> None:
    pieces = frame_of().pieces([USER, NEXT])
    assert "".join(text for text, _ in pieces) == "hello\n\nnext<end>A:"


def test_roles_out_of_order_are_refused() -> None:
    with pytest.raises(EngineCallError, match="a conversation with 'system' after 'user' cannot be written"):
        frame_of().pieces([USER, SYSTEM])
