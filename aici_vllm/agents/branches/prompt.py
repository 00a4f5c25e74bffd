"""A round's prompt: the tokens of the reply it continues, and the text to splice behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aici_vllm.agents.branches.kept import Kept
from aici_vllm.agents.messages import AIMessage, Message, UserMessage
from aici_vllm.agents.models.base import chat_dicts


@dataclass(frozen=True)
class BranchPrompt:
    """What a model sees: `token_ids`, then `tail`; `text` is both, as the chat template wrote them.

    `kept` is where an engine has the tokens already.
    """

    text: str
    token_ids: tuple[int, ...]
    tail: str = ""
    kept: Kept | None = None


@dataclass(frozen=True)
class ChatTemplate:
    """Conversations as text and tokens, by the renderer of a vLLM engine.

    `chat_template` is a Jinja text, by default the model's own; `options` go to the template. `tokenizer`
    names the engine's.
    """

    renderer: Any
    chat_template: str | None
    options: Mapping[str, Any]
    tokenizer: str

    def prompt(self, conversation: Sequence[Message]) -> BranchPrompt:
        """The prompt of a rendered conversation, token-exact as far as `continuation` finds.

        Raises ValueError for images: a branch's tokens cannot carry them.
        """
        if any(isinstance(message, UserMessage) and message.images for message in conversation):
            raise ValueError("Branches cannot show images to a model; use VLLMModel for this call.")
        text = self.text(conversation)
        known = continuation(conversation, text, self.tokenizer)
        return known or BranchPrompt(text, self.token_ids(text))

    def text(self, conversation: Sequence[Message]) -> str:
        """The conversation as the template writes it, ready for a reply."""
        from vllm.renderers import ChatParams

        options = {"add_generation_prompt": True, "continue_final_message": False, **self.options}
        params = ChatParams(
            chat_template=self.chat_template, chat_template_kwargs={**options, "tokenize": False}
        )
        _, prompt = self.renderer.render_messages(chat_dicts(conversation), params)
        if "prompt" not in prompt:
            raise ValueError("This model's chat template gives tokens and no text; use VLLMModel for it.")
        text: str = prompt["prompt"]
        return text

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that the template wrote, as `LLM.chat` makes them."""
        return tuple(self.renderer.get_tokenizer().encode(text, add_special_tokens=False))


def continuation(conversation: Sequence[Message], text: str, tokenizer: str) -> BranchPrompt | None:
    """The prompt that goes on from the last reply whose tokens are known and stand in `text` unchanged.

    `text` is what the template makes of the conversation. None when there is no such reply: it was edited, it
    was written in another tokenizer's tokens, or the template writes an earlier turn differently once others
    follow.
    """
    for message in reversed(conversation):
        known = message.sequence if isinstance(message, AIMessage) else None
        if known is None or known.reply_text != message.content or known.tokenizer != tokenizer:
            continue
        begun = known.prompt_text + known.reply_text
        if text.startswith(begun):
            return BranchPrompt(text, known.prompt_ids + known.reply_ids, text[len(begun) :], known.kept)
    return None
