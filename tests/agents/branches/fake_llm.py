"""A stand-in for `vllm.LLM`: it runs controllers with the project's own groups, and its model reads a script.

Tokens are single bytes, 256 ends a sequence. A chat ends with `A:`, after which the model writes its reply.
Checkpoints are kept as the engine keeps them, as tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import NativeProgram
from aici_vllm.offline import Usage
from constraints import Vocabulary
from tests.controller.fake_engine import FakeEngine

EOS = 256
CONTEXT = 4096

Answer = Callable[[str, int], str]
"""The reply to a prompt in the branch with this index."""


def chat(messages: Any) -> str:
    """A chat template that leaves earlier turns as they are."""
    marks = {"system": "S:", "user": "U:", "assistant": "A:"}
    return "".join(f"{marks[m['role']]}{m['content']}<end>" for m in messages) + "A:"


def vocabulary() -> Vocabulary:
    return Vocabulary(
        [bytes([byte]) for byte in range(256)] + [None],
        specials={EOS: b"<end>"},
        eos_token_ids=[EOS],
        encode=encode,
    )


def encode(text: str, **options: Any) -> list[int]:
    """Text as bytes, `<end>` as the end of a sequence."""
    pieces = [list(piece.encode()) for piece in text.split("<end>")]
    return [token for index, piece in enumerate(pieces) for token in ([EOS] if index else []) + piece]


class FakeLLM:
    """What `EngineSampler` uses of an LLM.

    `requests` holds the prompts it was sent, as text, `starts` the checkpoints that requests went on from.
    """

    def __init__(self, answer: Answer, template: Callable[[Any], str] = chat, **limits: Any) -> None:
        config = {"aici": {"limits": limits}}
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=config))
        self.model_config = SimpleNamespace(max_model_len=CONTEXT, tokenizer="bytes")
        self.renderer = self
        self.limits = Limits.from_config(limits)
        self.requests: list[str] = []
        self.starts: list[str] = []
        self.checkpoints: OrderedDict[str, list[int]] = OrderedDict()
        self.params: list[Any] = []
        self.fails: Exception | None = None
        self._answer, self._template = answer, template

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=encode)

    def render_messages(self, messages: Any, params: Any) -> tuple[Any, dict[str, str]]:
        return messages, {"prompt": self._template(messages)}

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> list[Any]:
        if self.fails is not None:
            raise self.fails
        pairs = zip(prompts, params, strict=True)
        return [self._run(prompt["prompt_token_ids"], one) for prompt, one in pairs]

    def _run(self, prompt: list[int], params: Any) -> Any:
        import cloudpickle

        self.requests.append(bytes_of(prompt).decode())
        self.params.append(params)
        args = params.extra_args
        start = args.get("controller_from")
        if start is not None:
            assert prompt == []
            self.starts.append(start)
        known = start is None or start in self.checkpoints
        group = self._group(prompt, start)
        self._forget(args.get("controller_drop"))
        controller = cloudpickle.loads(args["controller"])
        if not known:
            group.root.fail(f"there is no checkpoint {start!r}")
        else:
            FakeEngine(group, choose=self._next).run(lambda branch: NativeProgram(controller, "", branch))
        return SimpleNamespace(kv_transfer_params={"controller": found(group, self._keep(group, args))})

    def _group(self, prompt: list[int], start: str | None) -> Group:
        tokens = prompt if start is None else self.checkpoints.get(start, [])
        return Group(vocabulary(), list(tokens), max_tokens=CONTEXT, context=CONTEXT, limits=self.limits)

    def _keep(self, group: Group, args: dict[str, Any]) -> dict[int, str]:
        """Keep the branches that ended; their names by index."""
        names = {}
        for branch in group.branches:
            if "controller_checkpoint" in args and branch.error is None:
                name = f"{args['controller_checkpoint']}/{branch.index}"
                self.checkpoints[name] = list(branch.sequence.tokens)
                names[branch.index] = name
        while len(self.checkpoints) > self.limits.checkpoints:
            self.checkpoints.popitem(last=False)
        return names

    def _forget(self, name: str | None) -> None:
        for known in list(self.checkpoints):
            if name is not None and f"{known}/".startswith(f"{name}/"):
                del self.checkpoints[known]

    def _next(self, branch: Branch, allowed: list[int]) -> int:
        prompt, said = bytes_of(branch.sequence.tokens).rsplit(b"A:", 1)
        token = encode(self._answer(prompt.decode(), branch.index) + "<end>")[len(said)]
        return token if token in allowed else allowed[0]


def bytes_of(tokens: Sequence[int]) -> bytes:
    """What tokens stand for, the end of a sequence as `<end>`."""
    return b"".join(b"<end>" if token == EOS else bytes([token]) for token in tokens)


def found(group: Group, checkpoints: dict[int, str]) -> dict[str, Any]:
    """What the engine reports of a group, as far as agents read it."""
    branches = []
    for branch in group.branches:
        tokens = branch.sequence.tokens[branch.sequence.prompt_len :]
        branches.append(
            {
                "index": branch.index,
                "text": group.vocabulary.detokenize(tokens).decode(errors="replace"),
                "token_ids": tokens,
                "sources": [list(run) for run in branch.sequence.sources()],
                "finish_reason": branch.finish_reason,
                "error": branch.error,
                "logs": str(branch.log),
                "checkpoint": checkpoints.get(branch.index),
            }
        )
    values = group.variables.snapshot()
    usage = dict.fromkeys(Usage.__dataclass_fields__, 0)
    usage["sampled_tokens"] = sum(branch.sequence.sampled for branch in group.branches)
    return {
        "branches": branches,
        "variables": {name: value.decode() for name, value in values.items()},
        "variables_base64": {},
        "usage": usage,
    }
