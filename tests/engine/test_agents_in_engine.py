"""Agents on a real engine: the vLLM models, and retries as branches beside retries from the client."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from vllm import LLM, SamplingParams

import aici_vllm
from aici_vllm.agents import (
    AICall,
    AIClassify,
    AIExtract,
    AIGenerate,
    AIMessage,
    AsyncEngineSampler,
    AsyncVLLMModel,
    EngineSampler,
    ModelCallError,
    PrefixChecked,
    Reply,
    RetryConfig,
    SampleNode,
    ScriptedModel,
    ThompsonSampling,
    UserMessage,
    VLLMModel,
    airetry,
    airetry_async,
    last_output,
    pre_order,
    run,
    run_async,
)
from aici_vllm.agents.branches.kept import Kept
from aici_vllm.agents.branches.program import nothing
from tests.engine.conftest import ENGINE_ARGS, ENVIRONMENT, Engines
from tests.engine.regimes import REGIMES

QUESTION = "Name a colour. Answer with one word."


@pytest.fixture
def llm(engine: Engines) -> LLM:
    return engine(REGIMES[0], "embedded", **aici_vllm.engine_args())


def tree(call: AICall, message: Callable[[Any], Any] = lambda message: message) -> list[Any]:
    """Everything that a check or a retry reads or writes, without ids, in pre-order."""
    nodes = list(pre_order(call.samples))
    places = {node.id: place for place, node in enumerate(nodes)}
    config = call.config
    shape = [
        (
            node.parent and places[node.parent.id],
            (node.wins, node.visits, node.success, node.feedback),
            [message(entry) for entry in node.data],
        )
        for node in nodes
    ]
    return [places[call.active_sample_id], call.success, config.calls, config.retries, *shape]


def content(message: Any) -> str:
    return message.content


def greedy(**settings: Any) -> RetryConfig:
    return RetryConfig(temperature=0, **settings)


def reply_of(node: SampleNode) -> AIMessage:
    """The reply that a node was made with; feedback may stand behind it."""
    found = [message for message in node.data if isinstance(message, AIMessage)]
    return found[-1]


def count_rows(worker: Any) -> None:
    """Keep what each forward pass of this worker computes."""
    runner = worker.model_runner
    runner.rows_of_steps = []
    execute = runner.execute_model

    def counting(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduled.total_num_scheduled_tokens:
            runner.rows_of_steps.append(list(scheduled.num_scheduled_tokens.values()))
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = counting


def stop_counting(worker: Any) -> list[list[int]]:
    runner = worker.model_runner
    del runner.execute_model
    rows: list[list[int]] = runner.rows_of_steps
    return rows


@contextmanager
def steps_of(llm: LLM) -> Iterator[list[list[int]]]:
    """The forward passes made in the body: for each, how many tokens each of its rows computed."""
    steps: list[list[int]] = []
    llm.collective_rpc(count_rows)
    try:
        yield steps
    finally:
        steps += llm.collective_rpc(stop_counting)[0]


# Same replies, same tree.


@pytest.mark.parametrize("inplace", [False, True], ids=["appended", "in place"])
def test_greedy_trees_are_equal(llm: LLM, inplace: bool) -> None:
    def play(**where: Any) -> AICall:
        config = greedy(n_samples=2, max_retries=2, feedback_inplace=inplace)
        call = run(AIGenerate(QUESTION, config=config, api_kwargs={"max_tokens": 6}, **where))
        airetry(lambda x: "!" in last_output(x), call, "Louder.", max_retries=1)
        return airetry(lambda x: last_output(x).islower(), call, lambda x: f"No: {last_output(x)}")

    client = play(model=VLLMModel(llm))
    assert client.config.retries == 2
    assert tree(play(sampler=EngineSampler(llm))) == tree(client)


def test_sampled_replies_give_the_tree_that_they_give_on_the_client(llm: LLM) -> None:
    """The engine's random replies, played back to the client-side search, lead it the same way."""

    def play(call: AICall) -> AICall:
        run(call)
        airetry(lambda x: len(last_output(x)) % 3 > 0, call, "Longer.", max_retries=2)
        airetry(lambda x: "z" in last_output(x), call, lambda x: last_output(x)[::-1], max_retries=5)
        return call

    def new(**where: Any) -> AICall:
        scoring = ThompsonSampling(rng=random.Random(4))
        config = RetryConfig(n_samples=3, scoring=scoring)
        api_kwargs = {"n": 2, "max_tokens": 12, "seed": 11, "temperature": 1.5}
        return AIGenerate("Say something.", config=config, api_kwargs=api_kwargs, **where)

    inside = play(new(sampler=EngineSampler(llm)))
    made = sorted(pre_order(inside.samples), key=lambda node: node.id)[1:]
    replies = [reply_of(node) for node in made]
    assert len({reply.content for reply in replies}) > len(replies) / 2
    script = [Reply(r.content, finish_reason=r.finish_reason, tokens=r.tokens) for r in replies]
    outside = play(new(model=ScriptedModel(script)))
    assert inside.config.retries >= 2
    assert tree(inside) == tree(outside)


def test_forced_replies_give_equal_trees(llm: LLM) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    def forced(**shape: Any) -> dict[str, Any]:
        return {"structured_outputs": StructuredOutputsParams(**shape)}

    def play(**where: Any) -> AICall:
        config = RetryConfig(n_samples=2)
        call = run(AIGenerate(QUESTION, config=config, api_kwargs=forced(choice=["red"]), **where))
        call.kwargs["api_kwargs"] = forced(regex="(green|blue)ish")
        airetry(lambda x: last_output(x) == "violet", call, "Not that.", max_retries=1)
        call.kwargs["api_kwargs"] = forced(choice=["violet"])
        return airetry(lambda x: last_output(x) == "violet", call, "Flowers!", max_retries=2)

    client, inside = play(model=VLLMModel(llm)), play(sampler=EngineSampler(llm))
    assert inside.success and last_output(inside) == "violet"
    assert inside.config.retries == 2
    assert tree(inside)[:4] == tree(client)[:4]
    assert [entry[:2] for entry in tree(inside)[4:]] == [entry[:2] for entry in tree(client)[4:]]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    age: int


def test_other_kinds_of_calls(llm: LLM) -> None:
    def extract(**where: Any) -> AICall:
        call = AIExtract("Alice is 5.", return_type=Person, config=greedy(n_samples=2), **where)
        return run(call)

    def classify(**where: Any) -> AICall:
        call = AIClassify("Is red a colour?", choices=["yes", "no"], config=greedy(), **where)
        return run(call, api_kwargs={"max_tokens": 5})

    for kind in (extract, classify):
        client, inside = kind(model=VLLMModel(llm)), kind(sampler=EngineSampler(llm))
        assert tree(inside, content) == tree(client, content)
    assert isinstance(last_output(extract(sampler=EngineSampler(llm))), Person)


def test_stops_and_ends_are_vllms(llm: LLM) -> None:
    for api_kwargs in (
        {"stop": [" is", "o"], "max_tokens": 20},
        {"stop": [" is"], "include_stop_str_in_output": True, "max_tokens": 20},
        {"stop": ["e"], "min_tokens": 6, "max_tokens": 20},
        {"stop_token_ids": [314], "max_tokens": 20},
        {"max_tokens": 1},
        {"repetition_penalty": 1.3, "max_tokens": 20},
        {},
    ):
        client, inside = (
            run(AIGenerate(QUESTION, config=greedy(), api_kwargs=api_kwargs, **where))
            for where in ({"model": VLLMModel(llm)}, {"sampler": EngineSampler(llm)})
        )
        assert tree(inside) == tree(client), api_kwargs


# What is computed.


def test_a_round_computes_its_prompt_once(llm: LLM) -> None:
    llm.reset_prefix_cache()
    call = AIGenerate(QUESTION, config=greedy(n_samples=5), sampler=EngineSampler(llm))
    with steps_of(llm) as steps:
        run(call, api_kwargs={"max_tokens": 4, "min_tokens": 4})
    prompt, _ = reply_of(call.samples.children[0]).tokens or (0, 0)
    # The first branch computes the prompt, and so is a token ahead of those that share it.
    assert steps == [[prompt], [1] * 5, [1] * 5, [1] * 5, [1] * 4]
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_a_branch_that_ends_at_once_leaves_the_prompt_to_the_others(llm: LLM) -> None:
    llm.reset_prefix_cache()
    call = AIGenerate(QUESTION, config=greedy(n_samples=5), sampler=EngineSampler(llm))
    with steps_of(llm) as steps:
        run(call, api_kwargs={"max_tokens": 1})
    prompt, _ = reply_of(call.samples.children[0]).tokens or (0, 0)
    assert steps == [[prompt], [1] * 4]
    assert llm.reset_prefix_cache(), "blocks are still in use"


def computed(steps: list[list[int]]) -> int:
    return sum(sum(rows) for rows in steps)


def fewest_tokens(call: AICall) -> int:
    """What a search must compute if each node's samples are of one round.

    That is a round's prompt as far as its node does not have it, its last token once more for each further
    branch, and every sampled token but the last of a reply.
    """
    total = 0
    for node in pre_order(call.samples):
        sizes = [reply_of(child).tokens or (0, 0) for child in node.children]
        held = (1, 0) if node is call.samples else reply_of(node).tokens or (0, 0)
        total += sizes[0][0] - sum(held) + 1 if sizes else 0
        total += sum(sampled for _, sampled in sizes) - min(1, len(sizes))
    return total


def test_a_retry_computes_what_is_new(llm: LLM) -> None:
    """Not the prompt, not the reply that it goes on from, and the feedback once for all samples."""
    llm.reset_prefix_cache()
    sampler = EngineSampler(llm)
    call = AIGenerate(QUESTION, config=greedy(n_samples=3), sampler=sampler)
    with steps_of(llm) as first:
        run(call, api_kwargs={"max_tokens": 10, "min_tokens": 10})
    assert sampler.usage.computed_tokens == computed(first)
    with steps_of(llm) as steps:
        airetry(lambda x: False, call, "No.", max_retries=1)
    chosen = next(node for node in call.samples.children if node.children)
    sequence = reply_of(chosen).sequence
    assert sequence is not None
    held = len(sequence.prompt_ids) + len(sequence.reply_ids) - 1  # The last token was sampled, not computed.
    prompt, _ = reply_of(chosen.children[0]).tokens or (0, 0)
    assert steps[:2] == [[prompt - held], [1, 1, 1]]
    assert {row for rows in steps[1:] for row in rows} == {1}
    assert sampler.usage.computed_tokens == computed(first) + computed(steps)
    assert computed(first) + computed(steps) - sampler.usage.discarded_rows == fewest_tokens(call)
    assert llm.reset_prefix_cache(), "blocks are still in use"


def test_samples_over_the_limit_share_their_prompt_too(llm: LLM) -> None:
    llm.reset_prefix_cache()
    call = AIGenerate(QUESTION, config=greedy(n_samples=5), api_kwargs={"max_tokens": 3})
    with steps_of(llm) as steps:
        run(call, sampler=EngineSampler(llm, max_branches=2))
    prompt, _ = reply_of(call.samples.children[0]).tokens or (0, 0)
    assert [row for rows in steps for row in rows if row > 1] == [prompt]
    assert len({reply_of(node).content for node in call.samples.children}) == 1
    assert len(call.samples.children) == 5
    with pytest.raises(ValueError, match="at least 1"):
        EngineSampler(llm, max_branches=0)


def missing(llm: LLM, name: str) -> bool:
    """Whether the engine has no such checkpoint."""
    (result,) = aici_vllm.run(llm, nothing, [""], from_checkpoint=name)
    return "there is no checkpoint" in (result.branches[0].error or "")


def test_a_retry_goes_on_without_its_checkpoint(llm: LLM) -> None:
    def play(lose: Callable[[AICall], None], **where: Any) -> AICall:
        config = greedy(n_samples=2, max_retries=2)
        call = run(AIGenerate(QUESTION, config=config, api_kwargs={"max_tokens": 6}, **where))
        lose(call)
        return airetry(lambda x: False, call, lambda x: f"No: {last_output(x)}")

    def drop(call: AICall) -> None:
        kept = kept_of(call)
        (forgotten,) = aici_vllm.run(llm, nothing, [""], from_checkpoint=kept.name)
        assert forgotten.branches[0].error is None
        params = aici_vllm.request_params(nothing, drop_checkpoints=kept.search.name)
        llm.generate([{"prompt_token_ids": []}], params, use_tqdm=False)
        assert missing(llm, kept.name)

    sampler = EngineSampler(llm)
    client = play(lambda call: None, model=VLLMModel(llm))
    assert tree(play(drop, sampler=sampler)) == tree(client)
    assert tree(play(lambda call: sampler.close(), sampler=sampler)) == tree(client)
    with sampler:
        kept = kept_of(play(lambda call: None, sampler=sampler))
        assert not missing(llm, kept.name)
    assert missing(llm, kept.name)


def kept_of(call: AICall) -> Kept:
    """Where the engine keeps the first reply."""
    sequence = reply_of(call.samples.children[0]).sequence
    assert sequence is not None and sequence.kept is not None
    return sequence.kept


def test_a_retry_continues_from_the_tokens_of_its_sample(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    # Hot enough that neighbouring tokens are hardly ever those that the tokenizer would choose.
    api_kwargs = {"max_tokens": 60, "seed": 5, "temperature": 2.0}
    call = AIGenerate("Tell me of Zürich 🦊.", config=RetryConfig(n_samples=5), api_kwargs=api_kwargs)
    run(call, sampler=EngineSampler(llm))
    airetry(lambda x: False, call, "Longer.", max_retries=1, sampler=EngineSampler(llm))
    retokenized = 0
    for node in pre_order(call.samples):
        if node is call.samples or node.parent is call.samples:
            continue
        assert node.parent is not None
        before, here = reply_of(node.parent).sequence, reply_of(node).sequence
        assert before is not None and here is not None
        tokens = before.prompt_ids + before.reply_ids
        assert here.prompt_ids[: len(tokens)] == tokens
        assert tokenizer.decode(here.prompt_ids) == here.prompt_text
        retokenized += tuple(tokenizer.encode(here.prompt_text)) != here.prompt_ids
    assert retokenized, (
        "no reply was written in other tokens than the tokenizer's own: the test proves nothing"
    )


# Conditions on a prefix.


def at_most_four_words(text: str) -> bool:
    return text.count(" ") < 4


def test_a_branch_ends_when_its_condition_must_fail(llm: LLM) -> None:
    def condition(call: AICall) -> bool:
        return at_most_four_words(last_output(call))

    def first_check(check: Any, sampler: EngineSampler) -> AICall:
        call = AIGenerate("Tell me a story.", config=greedy(n_samples=2), api_kwargs={"max_tokens": 30})
        return airetry(check, run(call, sampler=sampler), "Shorter.", max_retries=0)

    checked = PrefixChecked(condition, at_most_four_words)
    whole = first_check(condition, EngineSampler(llm))
    with steps_of(llm) as steps:
        stopped = first_check(checked, EngineSampler(llm, condition=checked))
    long, short = (reply_of(call.samples.children[1]) for call in (whole, stopped))
    assert (long.finish_reason, short.finish_reason) == ("length", "condition")
    assert long.content.startswith(short.content) and not at_most_four_words(short.content)
    assert short.sequence is not None
    decode = llm.get_tokenizer().decode
    ids = short.sequence.reply_ids
    assert all(at_most_four_words(decode(ids[:end])) for end in range(len(ids)))
    assert len(steps) == 1 + len(ids)
    statistics = [[entry[:2] for entry in tree(call)[4:]] for call in (whole, stopped)]
    assert statistics[0] == statistics[1]


def test_airetry_tells_the_engine_its_condition(llm: LLM) -> None:
    def starts(call: AICall) -> bool:
        return last_output(call).startswith("Z")

    call = AIGenerate(QUESTION, config=greedy(n_samples=2), sampler=EngineSampler(llm))
    run(call, api_kwargs={"max_tokens": 8})
    airetry(PrefixChecked(starts, lambda text: text.startswith("Z"[: len(text)])), call, "", max_retries=1)
    retried = [reply_of(node) for node in pre_order(call.samples) if node.parent not in (None, call.samples)]
    assert retried or call.success
    assert all(reply.finish_reason == "condition" or reply.content.startswith("Z") for reply in retried)


def test_the_example(llm: LLM) -> None:
    path = Path(__file__).parents[2] / "examples" / "agents" / "branches.py"
    spec = importlib.util.spec_from_file_location("example_branches", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    call = example.ask(llm)
    replies = [reply_of(node) for node in call.samples if node is not call.samples]
    assert all(len(reply.content.split()) <= 2 for reply in replies)
    assert {reply.finish_reason for reply in replies} <= {"stop", "condition"}
    assert not call.success or example.one_word(last_output(call))


def test_failures_leave_tree_and_engine_in_order(llm: LLM) -> None:
    def broken(text: str) -> bool:
        raise ZeroDivisionError(f"at {text!r}")

    call = AIGenerate(QUESTION, config=greedy(n_samples=2), api_kwargs={"max_tokens": 4})
    with pytest.raises(ModelCallError, match=r"Branch 0 .* ZeroDivisionError: at"):
        run(call, sampler=EngineSampler(llm, condition=PrefixChecked(lambda x: True, broken)))
    assert len(call.samples) == 1 and call.success is False
    with pytest.raises(ModelCallError, match="maximum context length"):
        run(AIGenerate("word " * 3000, sampler=EngineSampler(llm)))
    with pytest.raises(ValueError, match="logprobs"):
        run(AIGenerate("u", sampler=EngineSampler(llm), api_kwargs={"logprobs": 1}))
    run(call, sampler=EngineSampler(llm))
    assert len(call.samples.children) == 2
    assert llm.reset_prefix_cache(), "blocks are still in use"


# The models.


def test_the_model_asks_through_the_chat_template(llm: LLM) -> None:
    model = VLLMModel(llm, sampling={"max_tokens": 6})
    (*prompt, first, second) = model([UserMessage("Hello")], api_kwargs={"n": 2, "seed": 3, "logprobs": True})
    assert [message.content for message in prompt][1:] == ["Hello"]
    text = llm.get_tokenizer().apply_chat_template(
        [{"role": "system", "content": prompt[0].content}, {"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    (plain,) = llm.generate([text], SamplingParams(max_tokens=1), use_tqdm=False)
    assert {first.tokens[0], second.tokens[0]} == {len(plain.prompt_token_ids or ())}
    assert first.log_prob <= second.log_prob < 0
    assert {first.sample_id, second.sample_id} == {1, 2} and first.run_id == second.run_id
    with pytest.raises(ModelCallError, match="maximum context length"):
        model([UserMessage("word " * 3000)])
    with pytest.raises(ModelCallError, match="embed"):
        model.embed(["a"])


def test_the_asynchronous_engine(engine: Engines, llm: LLM) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def play_kwargs() -> dict[str, Any]:
        return {"config": greedy(n_samples=2, max_retries=1), "api_kwargs": {"max_tokens": 6}}

    client = run(AIGenerate(VLLMModel(llm), QUESTION, **play_kwargs()))
    airetry(lambda x: False, client, "In lowercase.")

    async def play(call: AICall) -> AICall:
        await run_async(call)
        return await airetry_async(lambda x: False, call, "In lowercase.")

    async def cancelled(asynchronous: Any, call: AICall) -> None:
        task = asyncio.create_task(run_async(call, api_kwargs={"max_tokens": 1500, "min_tokens": 1500}))
        while not asynchronous.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not asynchronous.output_processor.has_unfinished_requests()

    async def main() -> None:
        asynchronous = AsyncLLM.from_engine_args(
            AsyncEngineArgs(str(engine.models["embedded"]), **{**ENGINE_ARGS, **aici_vllm.engine_args()})
        )
        try:
            model, sampler = AsyncVLLMModel(asynchronous), AsyncEngineSampler(asynchronous)
            assert tree(await play(AIGenerate(model, QUESTION, **play_kwargs()))) == tree(client)
            call = await play(AIGenerate(QUESTION, sampler=sampler, **play_kwargs()))
            assert tree(call) == tree(client)
            assert sampler.usage.computed_tokens - sampler.usage.discarded_rows == fewest_tokens(call)
            await sampler.close()
            await cancelled(asynchronous, AIGenerate(model, QUESTION))
            await cancelled(asynchronous, AIGenerate(QUESTION, sampler=sampler))
            with pytest.raises(ModelCallError, match="maximum context length"):
                await model([UserMessage("word " * 3000)])
            assert await asynchronous.reset_prefix_cache(), "blocks are still in use"
        finally:
            asynchronous.shutdown()

    with REGIMES[0].entered(ENVIRONMENT):
        asyncio.run(main())
