"""Conditions that can be checked on the beginning of a reply."""

from __future__ import annotations

from aici_vllm.agents import AICall, AIGenerate, PrefixChecked, PrefixCondition, ScriptedModel, airetry, run
from aici_vllm.agents.branches.condition import prefix_check


class Short:
    def __call__(self, call: AICall) -> bool:
        return self.may_still_pass(call.conversation[-1].content)

    def may_still_pass(self, text: str) -> bool:
        return len(text) < 3


def test_what_is_a_prefix_condition() -> None:
    def plain(call: AICall) -> bool:
        return True

    checked = PrefixChecked(plain, str.islower)
    assert isinstance(checked, PrefixCondition) and isinstance(Short(), PrefixCondition)
    assert not isinstance(plain, PrefixCondition)
    assert prefix_check(checked) is str.islower
    assert prefix_check(plain) is None


def test_it_is_a_condition_like_any_other() -> None:
    call = airetry(Short(), run(AIGenerate(ScriptedModel(["long", "ok"]), "u")), "Shorter.")
    assert call.success and call.config.retries == 1
