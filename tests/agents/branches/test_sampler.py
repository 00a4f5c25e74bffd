"""Branches against the client-side search with the same replies, on a stand-in for the engine."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from aici_vllm.agents import (
    AICall,
    AIGenerate,
    AIMessage,
    AsyncEngineSampler,
    EngineSampler,
    ModelCallError,
    PrefixChecked,
    RetryConfig,
    ScriptedModel,
    UserMessage,
    airetry,
    airetry_async,
    last_output,
    pre_order,
    run,
    run_async,
)
from tests.agents.branches.fake_llm import FakeLLM, bytes_of, chat

pytest.importorskip("vllm")


def colours(prompt: str, index: int) -> str:
    """A reply that depends on all of the prompt and on the branch."""
    names = ["red", "green", "blue", "grün", "yellow"]
    return names[(len(prompt) + 3 * index) % len(names)]


def contents(call: AICall) -> list[Any]:
    nodes = list(pre_order(call.samples))
    places = {node.id: place for place, node in enumerate(nodes)}
    rows = [
        (
            node.parent and places[node.parent.id],
            (node.wins, node.visits, node.success, node.feedback),
            [message.content for message in node.data],
        )
        for node in nodes
    ]
    return [places[call.active_sample_id], call.success, call.config.calls, call.config.retries, *rows]


def play(call: AICall, **options: Any) -> AICall:
    run(call)
    airetry(lambda x: len(last_output(x)) > 3, call, "Longer!", **options)
    return airetry(lambda x: last_output(x) == "pink", call, lambda x: f"Not {last_output(x)}.", **options)


class Played(ScriptedModel):
    """Gives the replies of `colours`; the number of the reply in its request stands for the branch."""

    def __init__(self, n_samples: int, branches: int) -> None:
        self._count = 0

        def answer(prompt: Any) -> str:
            index = self._count % n_samples % branches
            self._count += 1
            roles = {"SystemMessage": "system", "UserMessage": "user", "AIMessage": "assistant"}
            messages = [{"role": roles[type(m).__name__], "content": m.content} for m in prompt]
            return colours(chat(messages).removesuffix("A:"), index)

        super().__init__(answer)


@pytest.mark.parametrize("limits", [{}, {"checkpoints": 1}, {"checkpoints": 3}, {"branches": 2}], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["appended", "in place"])
@pytest.mark.parametrize(("n_samples", "n"), [(1, 1), (3, 1), (3, 3), (4, 2)])
def test_same_replies_same_tree(n_samples: int, n: int, inplace: bool, limits: dict[str, int]) -> None:
    """Whatever the engine still has of earlier rounds, and however many requests make a round."""

    def new(**where: Any) -> AICall:
        config = RetryConfig(n_samples=n_samples, feedback_inplace=inplace, max_retries=4)
        return AIGenerate("Which colour?", config=config, api_kwargs={"n": n}, **where)

    inside = play(new(sampler=EngineSampler(FakeLLM(colours, **limits))))
    outside = play(new(model=Played(n_samples, limits.get("branches", n_samples))))
    assert contents(inside) == contents(outside)
    assert inside.config.retries == 4 and inside.success is False
    ids = [[m.sample_id for m in node.data if isinstance(m, AIMessage)] for node in pre_order(inside.samples)]
    assert ids == [
        [m.sample_id for m in node.data if isinstance(m, AIMessage)] for node in pre_order(outside.samples)
    ]


FEEDBACK = "<end>U:### Feedback from Evaluator\n\nNo!\n<end>A:"
"""What the template writes behind a reply and before the next."""


def retried(llm: FakeLLM, *samplers: EngineSampler, n_samples: int = 1) -> AICall:
    """A first round, and a retry with the feedback "No!" for each further sampler."""
    first, *others = samplers or (EngineSampler(llm),) * 2
    call = run(AIGenerate("Which colour?", config=RetryConfig(n_samples=n_samples), sampler=first))
    for number, sampler in enumerate(others, start=1):
        airetry(lambda x: False, call, "No!", max_retries=number, sampler=sampler)
    return call


def newest(call: AICall) -> AIMessage:
    """The reply that was made last."""
    node = max(pre_order(call.samples), key=lambda node: node.id)
    reply = node.data[-1]
    assert isinstance(reply, AIMessage)
    return reply


def test_a_retry_sends_nothing_again_and_splices_what_is_new() -> None:
    llm = FakeLLM(colours)
    call = retried(llm, n_samples=3)
    first, second = llm.requests
    assert second == ""
    (start,) = llm.starts
    chosen = next(node for node in call.samples.children if node.children)
    sequence = chosen.data[2].sequence
    assert start == sequence.kept.name
    # What is kept ends with the reply: the end of the turn is the template's to write.
    assert bytes_of(llm.checkpoints[start]).decode() == first + chosen.data[2].content
    again = newest(call).sequence
    assert again is not None
    assert again.prompt_text == first + chosen.data[2].content + FEEDBACK
    assert bytes_of(again.prompt_ids).decode() == again.prompt_text


def test_what_the_engine_lost_is_sent_as_tokens_and_not_asked_for_again() -> None:
    llm = FakeLLM(colours)
    call = retried(llm, EngineSampler(llm))
    reply = call.conversation[-1]
    assert isinstance(reply, AIMessage) and reply.sequence is not None
    llm.checkpoints.clear()
    call.conversation.append(UserMessage("Sure?"))
    again = call.copy()
    run(call)
    begun = llm.requests[0] + reply.content
    assert llm.requests[1:] == ["", begun]
    run(again)
    assert llm.requests[3:] == [begun]
    assert newest(call).content == newest(again).content
    assert len(llm.starts) == 1


def test_what_a_pickle_or_another_engine_brings_is_sent_as_tokens() -> None:
    llm, other = FakeLLM(colours), FakeLLM(colours)
    call = retried(llm, EngineSampler(llm), EngineSampler(other))
    begun = llm.requests[0] + call.samples.children[0].data[2].content
    assert (other.requests, other.starts) == ([begun], [])
    tree = pickle.loads(pickle.dumps(retried(llm, EngineSampler(llm)).samples))
    loaded = AIGenerate(tree.children[0].data, sampler=EngineSampler(llm))
    loaded("Sure?")
    assert llm.requests[-1] == begun and llm.starts == []


def test_another_tokenizer_gets_the_text() -> None:
    llm, other = FakeLLM(colours), FakeLLM(colours)
    other.model_config.tokenizer = "others"
    call = retried(llm, EngineSampler(llm), EngineSampler(other))
    begun = llm.requests[0] + call.samples.children[0].data[2].content
    assert other.requests == [begun + FEEDBACK]


def test_the_names_of_checkpoints_cannot_be_guessed() -> None:
    llm = FakeLLM(colours)
    for _ in range(2):
        retried(llm, n_samples=2)
        gc.collect()
    names = [params.extra_args["controller_checkpoint"] for params in llm.params]
    searches = [re.fullmatch("agents-([0-9a-f]{32})/([12])", name) for name in names]
    assert all(searches) and [found[2] for found in searches if found] == ["1", "2"] * 2
    assert len({found[1] for found in searches if found}) == 2


def test_a_search_that_is_gone_is_forgotten_with_the_next_request() -> None:
    llm = FakeLLM(colours)
    call = retried(llm, n_samples=2)
    copy = call.copy()
    kept = set(llm.checkpoints)
    assert len(kept) == 4
    del call
    gc.collect()
    other = retried(llm, EngineSampler(llm))
    assert kept < set(llm.checkpoints), "the copy may still go on"
    del copy
    gc.collect()
    run(other)
    assert not kept & set(llm.checkpoints)
    assert len(llm.checkpoints) == 2


def test_a_closed_sampler_leaves_nothing_in_the_engine() -> None:
    llm = FakeLLM(colours)
    mine = retried(llm, n_samples=2)
    left = set(llm.checkpoints)
    with EngineSampler(llm) as sampler:
        calls = [retried(llm, sampler, sampler) for _ in range(2)]
        assert len(llm.checkpoints) == 8
    assert set(llm.checkpoints) == left
    asked = len(llm.starts)
    calls[0]("Go on.")  # The sampler begins anew.
    assert len(llm.starts) == asked, "what is forgotten is not asked for"
    run(mine)
    assert len(llm.starts) == asked + 1
    llm.fails = ConnectionError("gone")
    with pytest.raises(ModelCallError, match="ConnectionError: gone"):
        sampler.close()


def test_one_request_per_round_up_to_the_operators_limit() -> None:
    llm = FakeLLM(colours, branches=4)
    call = AIGenerate("Which colour?", config=RetryConfig(n_samples=10), api_kwargs={"seed": 3})
    run(call, sampler=EngineSampler(llm))
    assert len(call.samples.children) == 10
    # One computes the prompt, and three have branches that go on from it.
    assert llm.requests == [llm.requests[0], "", "", ""]
    assert len(set(llm.starts)) == 1
    assert [params.seed for params in llm.params[1:]] == [3, 4, 5]
    run(AIGenerate("u", config=RetryConfig(n_samples=16), sampler=EngineSampler(llm := FakeLLM(colours))))
    assert len(llm.requests) == 1


def test_the_prompt_of_several_requests_goes_on_from_what_is_kept() -> None:
    llm = FakeLLM(colours, branches=2)
    call = retried(llm, n_samples=3)
    first, *others = llm.requests
    assert others == [""] * 5
    shared = [name for name in dict.fromkeys(llm.starts) if llm.starts.count(name) == 2]
    texts = [bytes_of(llm.checkpoints[name]).decode() for name in shared]
    chosen = next(node for node in call.samples.children if node.children)
    assert texts == [first, first + chosen.data[2].content + FEEDBACK]


def test_a_sampler_adds_up_what_its_requests_cost() -> None:
    llm = FakeLLM(lambda prompt, index: "red")
    sampler = EngineSampler(llm)
    assert sampler.usage.sampled_tokens == 0
    retried(llm, sampler, sampler, n_samples=3)
    assert sampler.usage.sampled_tokens == 2 * 3 * len("red!")


def test_the_budget_bounds_a_round() -> None:
    config = RetryConfig(n_samples=5, max_calls=3)
    call = run(AIGenerate("u", config=config, sampler=EngineSampler(FakeLLM(colours))))
    assert (call.config.calls, len(call.samples.children)) == (3, 3)


def test_an_edited_reply_is_sent_as_text() -> None:
    llm = FakeLLM(colours)
    call = run(AIGenerate("Which colour?", sampler=EngineSampler(llm)))
    reply = call.conversation[-1]
    assert isinstance(reply, AIMessage)
    call.conversation[-1] = AIMessage("violet", sequence=reply.sequence)
    call("Sure?")
    assert llm.requests[1].endswith("A:violet<end>U:Sure?<end>A:")


def test_a_template_that_rewrites_earlier_turns_is_sent_as_text() -> None:
    def forgetful(messages: Any) -> str:
        return chat([m for m in messages if m["role"] != "system"][-1:])

    llm = FakeLLM(colours, forgetful)
    call = run(AIGenerate("Which colour?", sampler=EngineSampler(llm)))
    call("Sure?")
    assert llm.requests == ["U:Which colour?<end>A:", "U:Sure?<end>A:"]


def test_sequences_survive_copies_and_pickles_and_do_not_take_part_in_equality() -> None:
    call = run(AIGenerate("Which colour?", sampler=EngineSampler(FakeLLM(colours))))
    reply = call.conversation[-1]
    assert isinstance(reply, AIMessage) and reply.sequence is not None
    for twin in (call.copy().samples, pickle.loads(pickle.dumps(call.samples))):
        kept = twin.children[0].data[-1]
        assert kept.sequence == reply.sequence
    bare = AIMessage(reply.content, finish_reason=reply.finish_reason, tokens=reply.tokens)
    assert bare == reply and "sequence" not in repr(reply)


def test_a_condition_ends_its_branch() -> None:
    checked = PrefixChecked(lambda x: last_output(x).startswith("y"), lambda text: text.startswith("y"))
    call = AIGenerate(
        "Which colour?", config=RetryConfig(n_samples=5), sampler=EngineSampler(FakeLLM(colours))
    )
    run(call)
    whole = [node.data[-1].content for node in call.samples.children]
    assert sorted(whole) == sorted(["red", "green", "blue", "grün", "yellow"])
    call = AIGenerate("Which colour?", config=RetryConfig(n_samples=5))
    run(call, sampler=EngineSampler(FakeLLM(colours), condition=checked))
    replies = [node.data[-1] for node in call.samples.children]
    assert [(r.content, r.finish_reason) for r in replies] == [
        (name, "stop") if name == "yellow" else (name[0], "condition") for name in whole
    ]


def test_a_check_sees_whole_characters_only() -> None:
    def known(text: str) -> bool:
        return "�" not in text

    call = AIGenerate("x", config=RetryConfig(n_samples=5), api_kwargs={})
    run(call, sampler=EngineSampler(FakeLLM(colours), condition=PrefixChecked(lambda x: True, known)))
    assert {node.data[-1].finish_reason for node in call.samples.children} == {"stop"}


def test_samples_before_a_failed_branch_stay() -> None:
    def check(text: str) -> bool:
        if text == "g":
            raise LookupError("no g")
        return True

    call = AIGenerate("Which colour?", config=RetryConfig(n_samples=5))
    sampler = EngineSampler(FakeLLM(colours), condition=PrefixChecked(lambda x: True, check))
    with pytest.raises(ModelCallError, match="LookupError: no g"):
        run(call, sampler=sampler)
    prompt = "S:Act as a helpful AI assistant<end>U:Which colour?<end>"
    names = [colours(prompt, index) for index in range(5)]
    failed = next(index for index, name in enumerate(names) if name.startswith("g"))
    assert [node.data[-1].content for node in call.samples.children] == names[:failed]
    run(call, sampler=sampler, catch_errors=True)
    assert isinstance(call.error, ModelCallError) and call.success is False


def test_what_a_branch_cannot_do_is_refused() -> None:
    llm = FakeLLM(colours)
    for api_kwargs, message in (
        ({"logprobs": True}, "logprobs"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "nonsense"}}, "response_format"),
        ({"nope": 1}, "nope"),
    ):
        with pytest.raises(ValueError, match=message):
            run(AIGenerate("u", sampler=EngineSampler(llm), api_kwargs=api_kwargs))
    with pytest.raises(ValueError, match="images"):
        run(AIGenerate([UserMessage("u", images=("data:,",))], sampler=EngineSampler(llm)))
    with pytest.raises(TypeError, match=r"model=.*returned list"):
        run(AICall(lambda conversation, **kwargs: conversation, "u", sampler=EngineSampler(llm)))
    assert llm.requests == []


def test_an_engine_that_fails() -> None:
    llm = FakeLLM(colours)
    llm.fails = ConnectionError("gone")
    with pytest.raises(ModelCallError, match="ConnectionError: gone") as caught:
        run(AIGenerate("u", sampler=EngineSampler(llm)))
    assert caught.value.__cause__ is llm.fails
    llm.fails = None
    llm.generate = lambda *args, **kwargs: [SimpleNamespace(kv_transfer_params=None)]  # type: ignore[method-assign]
    with pytest.raises(ModelCallError, match="without the results"):
        run(AIGenerate("u", sampler=EngineSampler(llm)))


def test_other_functions_that_ask_their_model() -> None:
    def twice(conversation: Any, model: Any, **kwargs: Any) -> Any:
        async def ask() -> Any:
            first = await model(conversation, **kwargs)
            return await model([*first, UserMessage("And?")], **kwargs)

        return ask()

    llm = FakeLLM(colours)
    call = run(AICall(twice, "u", config=RetryConfig(n_samples=2), sampler=EngineSampler(llm)))
    assert [len(node.data) for node in call.samples.children] == [5, 5]
    assert len(llm.requests) >= 2
    model = ScriptedModel([])
    run(AICall(model, "u", sampler=EngineSampler(llm)))
    run(AIGenerate(model, "u", sampler=EngineSampler(llm)))
    assert model.calls == []


class FakeAsyncLLM(FakeLLM):
    """What `AsyncEngineSampler` uses of an AsyncLLM."""

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.vllm_config = self.llm_engine.vllm_config
        self.ids: list[str] = []

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:  # type: ignore[override]
        await asyncio.sleep(0)
        self.ids.append(request_id)
        if self.fails is not None:
            raise self.fails
        yield self._run(prompt["prompt_token_ids"], params)


def test_asynchronously() -> None:
    def new() -> AICall:
        return AIGenerate("Which colour?", config=RetryConfig(n_samples=5, max_retries=3))

    async def main() -> AICall:
        llm = FakeAsyncLLM(colours, branches=2)
        call, sampler = new(), AsyncEngineSampler(llm)
        await run_async(call, sampler=sampler)
        await airetry_async(lambda x: last_output(x) == "pink", call, "Pink!", sampler=sampler)
        # In each round one request computes the prompt, and three have branches.
        assert len(llm.ids) == len(set(llm.ids)) == 4 * 4
        assert len(llm.starts) == 4 * 4 - 1
        await sampler.close()
        assert not llm.checkpoints
        llm.fails = ConnectionError("gone")
        with pytest.raises(ModelCallError, match="gone"):
            await run_async(new(), sampler=sampler)
        return call

    client = run(new(), sampler=EngineSampler(FakeLLM(colours, branches=2)))
    airetry(
        lambda x: last_output(x) == "pink",
        client,
        "Pink!",
        sampler=EngineSampler(FakeLLM(colours, branches=2)),
    )
    assert contents(asyncio.run(main())) == contents(client)
