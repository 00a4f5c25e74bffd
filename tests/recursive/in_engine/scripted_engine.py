"""A stand-in for an engine: it runs the real controller, its model reads from a script, and it counts KV.

Tokens are single bytes, 256 ends a sequence and is spelled `<end>`. Checkpoints keep tokens and KV, and there
is no other cache, so what is computed is what the calls themselves do not share.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.group import Group
from aici_vllm.controller.program import NativeProgram
from aici_vllm.offline import BranchResult, ControllerResult, Usage
from aici_vllm.recursive.in_engine.engine import EngineAnswer, EngineCall, answer_of
from aici_vllm.recursive.in_engine.frame import ChatFrame, Message, read_frame
from aici_vllm.recursive.in_engine.program import Outcome, answer_call
from constraints import Vocabulary
from tests.controller.fake_engine import FakeEngine

EOS = 256
MARKS = {"system": "S:", "user": "U:", "assistant": "A:"}

Answer = Callable[[str], str]
"""The reply to a conversation, which is given as the text the model sees."""


def template(messages: list[Message]) -> str:
    return "".join(f"{MARKS[m['role']]}{m['content']}<end>" for m in messages) + "A:"


def encode(text: str) -> list[int]:
    pieces = [list(piece.encode()) for piece in text.split("<end>")]
    return [token for index, piece in enumerate(pieces) for token in ([EOS] if index else []) + piece]


def decode(tokens: list[int]) -> str:
    return b"".join(b"<end>" if token == EOS else bytes([token]) for token in tokens).decode()


VOCABULARY = Vocabulary(
    [bytes([byte]) for byte in range(256)] + [None],
    specials={EOS: b"<end>"},
    eos_token_ids=[EOS],
    encode=encode,
)


class ScriptedEngine:
    """What an `EngineChat` needs of an engine.

    calls: every call that was sent, but not those that only drop checkpoints.
    prompts: what the model saw before each reply, in the order in which they ended.
    computed: tokens computed in all calls.
    live, most_live: calls under way, and the most there ever were; `aborted` counts those cancelled.
    checkpoints: name → tokens.
    before: awaited before a call runs, for tests that hold or fail calls.
    """

    def __init__(self, answer: Answer, *, context: int = 20_000, kept: int = 256) -> None:
        self.context = context
        self.calls: list[EngineCall] = []
        self.prompts: list[str] = []
        self.computed = 0
        self.live = self.most_live = self.aborted = 0
        self.checkpoints: OrderedDict[str, list[int]] = OrderedDict()
        self.before: Callable[[EngineCall], Awaitable[Any]] = lambda call: asyncio.sleep(0)
        self._frame: ChatFrame | None = None
        self._answer = answer
        self._kept = kept

    async def frame(self) -> ChatFrame:
        async def render(messages: list[Message]) -> str:
            return template(messages)

        self._frame = self._frame or await read_frame(render)
        return self._frame

    async def token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(encode(text))

    async def aclose(self) -> None:
        """Nothing to let go of."""

    async def send(self, call: EngineCall) -> EngineAnswer:
        if call.plan.shape != "nothing":
            self.calls.append(call)
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        try:
            await self.before(call)
            return answer_of(self._run(call))
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.live -= 1

    def _run(self, call: EngineCall) -> ControllerResult:
        assert not (call.prompt and call.from_checkpoint)
        known = self.checkpoints.get(call.from_checkpoint or "")
        prompt = list(call.prompt) if known is None else known
        group = Group(
            VOCABULARY,
            prompt or [0],
            max_tokens=self.context,
            context=self.context,
            arg=call.plan.as_json(),
        )
        self._drop(call.drop)
        if call.from_checkpoint is not None and known is None:
            group.root.fail(
                f"ValueError: there is no checkpoint {call.from_checkpoint!r}: send the text again"
            )
        else:
            FakeEngine(group, choose=self._next).run(
                lambda branch: NativeProgram(answer_call, group.arg, branch)
            )
            prompt_tokens = Outcome.from_json(group.variables.snapshot()["outcome"]).prompt_tokens
            self.prompts += [decode(group.root.sequence.tokens[:prompt_tokens])] * (
                group.root.sequence.sampled > 0
            )
        self._keep(call.checkpoint, group.root)
        return self._result(group.root, 0 if known is None else len(known) - 1)

    def _next(self, branch: Branch, allowed: list[int]) -> int:
        if allowed == [EOS]:
            return EOS
        seen, said = decode(branch.sequence.tokens).rsplit("A:", 1)
        script = encode(f"{self._answer(f'{seen}A:')}<end>")
        done = len(encode(said))
        wanted = script[done] if done < len(script) else EOS
        return wanted if wanted in allowed else allowed[0]

    def _keep(self, name: str | None, branch: Branch) -> None:
        if name is not None and branch.error is None:
            self.checkpoints[f"{name}/0"] = list(branch.sequence.tokens)
            while len(self.checkpoints) > self._kept:
                self.checkpoints.popitem(last=False)

    def _drop(self, name: str | None) -> None:
        for known in list(self.checkpoints):
            if name is not None and f"{known}/".startswith(f"{name}/"):
                del self.checkpoints[known]

    def _result(self, branch: Branch, shared: int) -> ControllerResult:
        sequence = branch.sequence
        added = sequence.tokens[sequence.prompt_len :]
        sources = sequence.sources()
        last_sampled = max((i for i, (source, _) in enumerate(sources) if source == "sampled"), default=-1)
        up_to = sequence.prompt_len + sum(count for _, count in sources[: last_sampled + 1])
        prefilled_only = last_sampled < 0 and sequence.sampled
        computed = len(sequence) - shared if prefilled_only else max(0, up_to - 1 - shared)
        computed = computed if sequence.sampled else 0
        self.computed += computed
        text = VOCABULARY.detokenize(added).decode(errors="replace")
        result = BranchResult(0, text, added, sources, branch.finish_reason or "", branch.error, "", None)
        usage = Usage(sequence.sampled, sequence.spliced, 0, computed, 0)
        return ControllerResult([result], branch.group.variables.snapshot(), usage)
