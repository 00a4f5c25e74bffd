"""Operations on conversations, against results worked by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from aici_vllm.agents import (
    AIGenerate,
    AIMessage,
    DataMessage,
    Message,
    SystemMessage,
    UserMessage,
    last_message,
    last_output,
    remove_used_kwargs,
    split_multi_samples,
    truncate_conversation,
)

SYSTEM, USER = SystemMessage("s"), UserMessage("u")


def test_last_message_and_output() -> None:
    reply = AIMessage("hi")
    assert last_message([USER, reply]) is reply
    assert last_output([USER, reply]) == "hi"
    assert last_message([]) is None
    assert last_output([]) is None
    call = AIGenerate("Say hi!")
    assert last_message(call) == UserMessage("Say hi!")
    assert last_output(call) == "Say hi!"
    assert last_output([DataMessage({"a": 1})]) == {"a": 1}


def test_remove_used_kwargs_keeps_the_order_of_the_rest() -> None:
    kwargs = {"c": 1, "a": 2, "model": "m", "b": 3}
    conversation: list[Message] = [SystemMessage("{{a}}"), UserMessage("{{b}} {{a}}"), AIMessage("{{c}}")]
    rest = remove_used_kwargs(kwargs, conversation)
    assert list(rest.items()) == [("c", 1), ("model", "m")]
    assert len(kwargs) == 4
    assert remove_used_kwargs(kwargs, []) == kwargs


def test_split_leaves_single_replies() -> None:
    for conversation in (
        [AIMessage("a", 1, 1)],
        [USER, AIMessage("a", 1, None)],
        [USER, AIMessage("a", 1, 1), USER],
        [USER, DataMessage("a", 1, 1), DataMessage("b", 1, 2)],
    ):
        result = split_multi_samples(conversation)  # type: ignore[arg-type]
        assert len(result) == 1
        assert result[0] is conversation
    assert split_multi_samples([]) == [[]]


def test_split_gives_each_reply_the_common_past() -> None:
    first, second = AIMessage("a", 7, 1), AIMessage("b", 7, 2)
    assert split_multi_samples([SYSTEM, USER, first, second]) == [
        [SYSTEM, USER, first],
        [SYSTEM, USER, second],
    ]


def test_split_keeps_replies_of_earlier_runs() -> None:
    old1, old2 = AIMessage("old", 1, 1), AIMessage("old", 1, 2)
    new1, new2 = AIMessage("new1", 2, 1), AIMessage("new2", 2, 2)
    samples = split_multi_samples([USER, old1, old2, USER, new1, new2])
    past = [USER, old1, old2, USER]
    assert samples == [[*past, new1], [*past, new2]]


def of_lengths(*lengths: int) -> list[Message]:
    return [UserMessage(letter * length) for letter, length in zip("abcdefgh", lengths, strict=False)]


def kept(conversation: list[Message], limit: int) -> str:
    return "".join(str(message.content)[0] for message in truncate_conversation(conversation, limit))


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ((10, 10, 10), 30, "abc"),  # fits exactly
        ((10, 10, 10), 29, "bc"),
        ((5, 10, 5, 10, 10), 30, "acde"),  # b does not fit, c still does
        ((5, 5, 10, 10), 25, "acd"[:1] + "cd"),
        ((20, 5, 10, 10), 25, "bcd"),
        ((1, 100, 100), 50, "bc"),  # the last two stay whatever their length
        ((100, 100), 50, "ab"),
        ((100,), 50, "a"),
    ],
)
def test_truncate(lengths: tuple[int, ...], limit: int, expected: str) -> None:
    assert kept(of_lengths(*lengths), limit) == expected


def test_truncate_returns_the_same_object_when_nothing_is_cut() -> None:
    fitting = of_lengths(10, 10, 10)
    assert truncate_conversation(fitting, 30) is fitting
    two = of_lengths(100, 100)
    assert truncate_conversation(two, 1) is two
    assert truncate_conversation(fitting) is fitting
    assert truncate_conversation(fitting, 25) is not fitting


def test_truncate_properties() -> None:
    rng = random.Random(2)
    for _ in range(300):
        conversation = of_lengths(*(rng.randint(1, 9) for _ in range(rng.randint(3, 7))))
        limit = rng.randint(1, 60)
        result = truncate_conversation(conversation, limit)
        sizes = [len(message.content) for message in conversation]
        if sum(sizes) <= limit:
            assert result is conversation
            continue
        # The greedy choice is the lexicographically largest choice of earlier messages that fits.
        room = limit - sum(sizes[-2:])
        choices = itertools.product((1, 0), repeat=len(sizes) - 2)
        fitting = (c for c in choices if sum(s for s, take in zip(sizes, c, strict=False) if take) <= room)
        best = next(fitting, (0,) * (len(sizes) - 2))
        expected = [m for m, take in zip(conversation, (*best, 1, 1), strict=True) if take]
        assert result == expected


def test_truncate_refuses_a_limit_of_zero() -> None:
    with pytest.raises(ValueError, match="positive"):
        truncate_conversation([], 0)
