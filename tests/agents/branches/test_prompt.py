"""Which tokens a prompt continues."""

from __future__ import annotations

import pytest

from aici_vllm.agents import AIMessage, Conversation, SystemMessage, UserMessage
from aici_vllm.agents.branches.prompt import BranchPrompt, ChatTemplate, continuation
from aici_vllm.agents.messages import TokenSequence
from tests.agents.branches.fake_llm import FakeLLM, chat, encode


def reply(
    content: str,
    *,
    prompt: str,
    ids: tuple[int, ...] = (7, 8),
    text: str | None = None,
    tokenizer: str = "bytes",
) -> AIMessage:
    known = TokenSequence(prompt, (1, 2, 3), content if text is None else text, ids, tokenizer)
    return AIMessage(content, sequence=known)


def test_the_last_reply_that_stands_unchanged_is_continued() -> None:
    first, second = reply("a", prompt="P1"), reply("b", prompt="P1a|P2", ids=(9,))
    said: Conversation = [UserMessage("p"), first, UserMessage("q"), second, UserMessage("r")]
    assert continuation(said, "P1a|P2b|P3", "bytes") == BranchPrompt("P1a|P2b|P3", (1, 2, 3, 9), "|P3")
    # The second turn is written differently: the first is still the same.
    assert continuation(said, "P1a|..b|P3", "bytes") == BranchPrompt("P1a|..b|P3", (1, 2, 3, 7, 8), "|..b|P3")
    assert continuation(said, "P0", "bytes") is None


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("a"),
        reply("a", prompt="P1", text="a stop"),
        reply("", prompt="P2"),
        reply("b", prompt="P1"),
        reply("a", prompt="P1", tokenizer="words"),
    ],
    ids=["unknown", "cut at a stop", "another prompt", "another reply", "another tokenizer"],
)
def test_nothing_to_continue(message: AIMessage) -> None:
    assert continuation([UserMessage("p"), message, UserMessage("q")], "P1a|P2", "bytes") is None


def test_without_known_tokens_the_text_is_tokenized() -> None:
    template = ChatTemplate(FakeLLM(lambda prompt, index: "", chat).renderer, None, {}, "bytes")
    prompt = template.prompt([SystemMessage("s"), UserMessage("u")])
    assert prompt == BranchPrompt("S:s<end>U:u<end>A:", tuple(encode("S:s<end>U:u<end>A:")))
    with pytest.raises(ValueError, match="VLLMModel"):
        template.prompt([UserMessage("u", images=("data:,",))])
