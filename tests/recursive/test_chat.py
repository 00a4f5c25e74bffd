"""How chat functions are called, and what their answers report."""

import asyncio

import pytest

from aici_vllm.recursive import Reply, Usage
from aici_vllm.recursive.chat import call_off_loop, is_async, run_to_end, settle, usage_of, with_model


def test_the_signature_decides_whether_the_model_is_passed():
    assert with_model(lambda messages, model: (messages, model))("m", "big") == ("m", "big")
    assert with_model(lambda messages, model=None: (messages, model))("m", "big") == ("m", "big")
    assert with_model(lambda messages, *, model=None: (messages, model))("m", "big") == ("m", "big")
    assert with_model(lambda messages: messages)("m", "big") == "m"
    assert with_model(lambda *args: args)("m", "big") == ("m", "big")


def test_a_type_error_inside_the_function_is_its_own_and_comes_after_one_call():
    calls = []

    def chat(messages, model=None):
        calls.append(model)
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        with_model(chat)("m", "big")
    assert calls == ["big"]


def test_further_keywords_are_passed_on():
    assert with_model(lambda prompt, model=None, *, regex=None: regex)("p", None, regex="a+") == "a+"


def test_a_reply_is_a_string_that_carries_its_usage():
    reply = Reply("yes", Usage(10, 4, 2))
    assert reply == "yes" and isinstance(reply, str)
    assert usage_of(reply) == Usage(10, 4, 2)
    assert usage_of("yes") is None
    assert Usage(1, 2, 3) + Usage(10, 20, 30) == Usage(11, 22, 33)


async def double(value):
    await asyncio.sleep(0)
    return 2 * value


def test_coroutine_functions_are_known_through_wrappers():
    assert is_async(double) and is_async(with_model(double))
    assert not is_async(len) and not is_async(with_model(lambda messages: ""))


def test_settle_takes_values_and_awaitables():
    async def both():
        return (
            await settle(3),
            await settle(double(3)),
            await call_off_loop(double, 4),
            await call_off_loop(abs, -5),
        )

    assert asyncio.run(both()) == (3, 6, 8, 5)


def test_what_never_waits_runs_without_an_event_loop():
    async def never_waits():
        return await settle(7)

    assert run_to_end(never_waits()) == 7


def test_what_waits_is_refused_without_an_event_loop():
    with pytest.raises(TypeError, match="use arun"):
        run_to_end(double(1))
