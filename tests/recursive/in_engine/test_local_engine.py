"""Calls on a `vllm.LLM`: one thread steps it, begins and aborts what it is told to, and ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from aici_vllm.recursive.in_engine.engine import EngineCall
from aici_vllm.recursive.in_engine.errors import CheckpointGoneError, EngineCallError
from aici_vllm.recursive.in_engine.local_engine import AsyncLLMEngine, LLMEngine
from aici_vllm.recursive.in_engine.program import Plan
from tests.recursive.in_engine.scripted_engine import encode, template


class FakeLLM:
    """What `LLMEngine` uses of an LLM. A request ends once `steps` steps have seen it."""

    def __init__(self, steps: int = 3) -> None:
        self.llm_engine = self.renderer = self
        self.model_config = SimpleNamespace(max_model_len=100)
        self.steps = steps
        self.running: dict[str, int] = {}
        self.aborted: list[str] = []
        self.added: list[tuple[Any, Any]] = []
        self.most = 0
        self.threads: set[int] = set()
        self.error: str | None = None
        self.may_end = threading.Event()
        self.may_end.set()

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text, add_special_tokens: encode(text))

    def render_messages(self, messages: Any, params: Any) -> Any:
        return messages, {"prompt": template(messages)}

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        if params.extra_args.get("controller_checkpoint") == "bad":
            raise ValueError("a bad name")
        self.added.append((prompt, params))
        self.running[request_id] = 0
        self.most = max(self.most, len(self.running))

    def abort_request(self, ids: list[str]) -> None:
        self.aborted += ids
        for request_id in ids:
            del self.running[request_id]

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        for request_id in self.running:
            self.running[request_id] += 1
        over = [i for i, seen in self.running.items() if seen >= self.steps and self.may_end.is_set()]
        for request_id in over:
            del self.running[request_id]
        return [SimpleNamespace(request_id=i, finished=True, kv_transfer_params=self._found()) for i in over]

    def _found(self) -> dict[str, Any]:
        outcome = '{"reason": "stop", "prompt_tokens": 5, "spent": 7, "reply_tokens": 2}'
        branch = {
            "index": 0,
            "text": "",
            "token_ids": [1, 2, 3, 8, 9],
            "sources": [["spliced", 3], ["sampled", 2]],
            "finish_reason": "stop",
            "error": self.error,
            "logs": "",
            "checkpoint": None,
        }
        usage = dict.fromkeys(("sampled_tokens", "spliced_tokens", "forward_passes"), 0)
        return {
            "controller": {
                "branches": [branch],
                "variables": {"outcome": outcome, "reply": "ok"},
                "variables_base64": {},
                "usage": {**usage, "computed_tokens": 5, "discarded_rows": 1},
            }
        }


CALL = EngineCall(Plan([("x", True)]), prompt=(1, 2), sampling=(("temperature", 0.0),))


def test_calls_run_together_in_one_thread_that_ends() -> None:
    llm = FakeLLM()

    async def go() -> None:
        engine = LLMEngine(llm)
        answers = await asyncio.gather(*(engine.send(CALL) for _ in range(50)))
        assert {answer.text for answer in answers} == {"ok"}
        # 4 tokens were computed, one of them the first of the reply.
        assert answers[0].prefilled == 3 and answers[0].added == (1, 2, 3, 8, 9)

    asyncio.run(go())
    assert llm.most > 1 and len(llm.threads) == 1
    assert not any(thread.name == "rlm-engine" and thread.is_alive() for thread in threading.enumerate())


def test_a_call_as_vllm_gets_it() -> None:
    llm = FakeLLM()
    call = EngineCall(CALL.plan, (), (("top_p", 0.5),), "mine", "tree/1/0", "tree/1")
    asyncio.run(LLMEngine(llm).send(call))
    ((prompt, params),) = llm.added
    assert prompt == {"prompt_token_ids": []} and params.top_p == 0.5 and params.max_tokens is None
    assert params.extra_args == {
        "controller": "recursive",
        "controller_arg": call.plan.as_json(),
        "controller_checkpoint": "mine",
        "controller_from": "tree/1/0",
        "controller_drop": "tree/1",
    }


def test_a_cancelled_call_is_aborted_and_the_others_go_on() -> None:
    llm = FakeLLM()
    llm.may_end.clear()

    async def go() -> None:
        engine = LLMEngine(llm)
        leaving, staying = (asyncio.create_task(engine.send(CALL)) for _ in range(2))
        while len(llm.running) < 2:
            await asyncio.sleep(0.001)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        while not llm.aborted:
            await asyncio.sleep(0.001)
        llm.may_end.set()
        assert (await staying).text == "ok"

    asyncio.run(go())
    assert len(llm.aborted) == 1 and not llm.running


class Stepwise(FakeLLM):
    """Each step waits for leave, and says that it has begun."""

    def __init__(self) -> None:
        super().__init__(steps=1000)
        self.begun, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.done = 0

    def step(self) -> list[Any]:
        self.begun.release()
        self.leave.acquire()
        self.done += 1
        return super().step()


def test_no_step_begins_with_a_call_that_was_cancelled() -> None:
    llm = Stepwise()

    async def go() -> None:
        call = asyncio.create_task(LLMEngine(llm).send(CALL))
        for _ in range(3):
            await asyncio.to_thread(llm.begun.acquire)
            if llm.done < 2:
                llm.leave.release()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        llm.leave.release()

    asyncio.run(go())
    for thread in threading.enumerate():
        if thread.name == "rlm-engine":
            thread.join()
    assert llm.done == 3 and len(llm.aborted) == 1 and not llm.running


def test_refusals_and_failures_are_errors_of_the_call() -> None:
    async def send(llm: FakeLLM, call: EngineCall = CALL) -> None:
        await LLMEngine(llm).send(call)

    with pytest.raises(EngineCallError, match="the engine refused the call: a bad name"):
        asyncio.run(send(FakeLLM(), EngineCall(CALL.plan, checkpoint="bad")))
    llm = FakeLLM()
    llm.error = "ValueError: there is no checkpoint 'x': send the text again"
    with pytest.raises(CheckpointGoneError):
        asyncio.run(send(llm))
    llm.error = "TypeError: odd"
    with pytest.raises(EngineCallError, match="the call failed in the engine: TypeError: odd"):
        asyncio.run(send(llm))


@pytest.mark.parametrize("broken", ["step", "add_request"])
def test_a_broken_engine_fails_every_call(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    llm = FakeLLM()
    monkeypatch.setattr(llm, broken, fail)

    async def go() -> list[Any]:
        engine = LLMEngine(llm)
        return await asyncio.gather(*(engine.send(CALL) for _ in range(3)), return_exceptions=True)

    errors = asyncio.run(go())
    assert all("the engine failed: out of memory" in str(error) for error in errors)


def test_the_frame_is_that_of_the_models_template() -> None:
    async def go() -> None:
        engine = LLMEngine(FakeLLM())
        frame = await engine.frame()
        assert frame is await engine.frame() and engine.context == 100
        assert frame.between["user", "assistant"] == "<end>A:"
        assert await engine.token_ids("S:") == tuple(b"S:")

    asyncio.run(go())


class FakeAsyncLLM(FakeLLM):
    """What `AsyncLLMEngine` uses of an `AsyncLLM`."""

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.add_request(request_id, prompt, params)
        try:
            while not self.may_end.is_set():
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.abort_request([request_id])
            raise
        del self.running[request_id]
        yield SimpleNamespace(kv_transfer_params=self._found())


def test_calls_on_an_asynchronous_engine() -> None:
    llm = FakeAsyncLLM()

    async def go() -> None:
        engine = AsyncLLMEngine(llm)
        assert (await engine.send(CALL)).text == "ok"
        llm.may_end.clear()
        leaving = asyncio.create_task(engine.send(CALL))
        while not llm.running:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        with pytest.raises(EngineCallError, match="the engine refused the call: a bad name"):
            await engine.send(EngineCall(CALL.plan, checkpoint="bad"))

    asyncio.run(go())
    assert len(llm.aborted) == 1 and not llm.running
