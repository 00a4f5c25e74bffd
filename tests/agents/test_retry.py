"""Checks and retries: which samples are checked, what is chosen, what is counted, what the model sees."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from aici_vllm.agents import (
    UCT,
    AICall,
    AIGenerate,
    AIMessage,
    AITemplate,
    Conversation,
    RetryBudgetExceeded,
    RetryConfig,
    SampleNode,
    SampleRound,
    ScriptedModel,
    TemplateNotFound,
    UserMessage,
    airetry,
    backpropagate,
    evaluate_condition,
    expand,
    is_valid,
    last_output,
    pre_order,
    print_samples,
    retry,
    run,
)

Check = Callable[[AICall], bool]


def scripted(*replies: Any, **options: Any) -> tuple[AICall, ScriptedModel]:
    model = ScriptedModel(replies)
    return AIGenerate(model, "prompt", **options), model


def stats(call: AICall) -> list[tuple[int, int]]:
    return [(node.wins, node.visits) for node in pre_order(call.samples)]


def tree_text(call: AICall) -> str:
    file = io.StringIO()
    print_samples(call.samples, file=file)
    return re.sub(r"id: \d+", "id", file.getvalue())


def starts(letter: str) -> Check:
    return lambda call: str(last_output(call)).startswith(letter)


# evaluate_condition


def test_the_published_example_that_passes() -> None:
    call = AIGenerate("Say hi!", config=RetryConfig(n_samples=2))
    sample = expand(call.samples, call.conversation, success=True)
    call.active_sample_id = sample.id
    passed, node = evaluate_condition(lambda x: "hi" in last_output(x), call)
    assert passed is True
    assert node is sample
    assert (node.wins, node.visits, node.success) == (1, 1, True)


def test_the_published_example_that_fails() -> None:
    call = AIGenerate(AITemplate("BlankSystemUser"), system="a", user="b")
    sample = expand(call.samples, call.conversation, success=True)
    call.active_sample_id = sample.id
    passed, node = evaluate_condition(lambda x: "NOTFOUND" in last_output(x), call, "Feedback X")
    assert passed is False
    assert node is sample
    assert (node.wins, node.success, node.feedback) == (0, False, "\nFeedback X")


def grown() -> tuple[AICall, dict[str, SampleNode]]:
    """A call with the tree root(a(a1, a2), b), samples that say their own names."""
    call = AIGenerate("prompt")
    root = call.samples
    nodes = {"root": root}
    for name, parent in (("a", "root"), ("b", "root"), ("a1", "a"), ("a2", "a")):
        nodes[name] = expand(nodes[parent], [UserMessage("prompt"), AIMessage(name)])
    call.active_sample_id, call.conversation = nodes["b"].id, nodes["b"].data
    return call, nodes


def test_samples_are_checked_in_pre_order_whatever_the_ordering() -> None:
    for ordering in ("PostOrderDFS", "PreOrderDFS"):
        call, nodes = grown()
        call.config.ordering = ordering
        seen: list[tuple[str, int]] = []

        def note(shown: AICall, seen: list[tuple[str, int]] = seen) -> bool:
            seen.append((last_output(shown), shown.active_sample_id))
            return False

        evaluate_condition(note, call)
        assert seen == [(name, nodes[name].id) for name in ("a", "a1", "a2", "b")]


def test_the_last_passing_sample_in_pre_order_is_chosen() -> None:
    call, nodes = grown()
    passed, node = evaluate_condition(lambda x: last_output(x) in ("a", "a1"), call)
    assert passed
    assert node is nodes["a1"]
    assert stats(call) == [(2, 4), (2, 3), (1, 1), (0, 1), (0, 1)]
    assert [nodes[name].success for name in ("root", "a", "a1", "a2", "b")] == [
        None,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("ordering", "expected"), [("PostOrderDFS", "a1"), ("PreOrderDFS", "a")])
def test_without_a_pass_the_best_by_score_and_ordering_is_chosen(ordering: str, expected: str) -> None:
    call, nodes = grown()
    call.config.ordering = ordering
    # 0/4, 0/3, 0/1, 0/1, 0/1: b scores sqrt(2 ln 4) = 1.67, a1 and a2 sqrt(2 ln 3) = 1.48, a .96.
    assert evaluate_condition(lambda x: False, call)[1] is nodes["b"]
    # Without exploration all samples score 0 and the ordering decides; the root is put below them.
    call, nodes = grown()
    call.config.ordering, call.config.scoring = ordering, UCT(0.0)
    nodes["root"].wins, nodes["root"].visits = -1, 1
    assert evaluate_condition(lambda x: False, call)[1] is nodes[expected]


def test_failed_samples_are_skipped_unless_active() -> None:
    call, nodes = grown()
    nodes["a"].success = False
    nodes["a1"].success = None
    nodes["b"].success = False
    seen: list[str] = []

    def note(shown: AICall) -> bool:
        seen.append(last_output(shown))
        return True

    passed, node = evaluate_condition(note, call)
    assert seen == ["a2", "b"]
    assert passed
    assert node is nodes["b"]
    assert nodes["b"].success is False  # a pass does not revive it


def test_only_the_active_sample_without_evaluate_all() -> None:
    call, nodes = grown()
    evaluate_condition(lambda x: False, call, "F", evaluate_all=False)
    assert [node.visits for node in nodes.values()] == [1, 0, 1, 0, 0]
    assert [node.feedback for node in nodes.values()] == ["", "", "\nF", "", ""]


def test_feedback_functions_see_each_failing_sample_and_feedback_accumulates() -> None:
    call, nodes = grown()
    evaluate_condition(starts("a"), call, lambda x: f"not {last_output(x)}")
    assert nodes["b"].feedback == "\nnot b"
    assert nodes["a"].feedback == ""
    evaluate_condition(starts("a"), call, "again")
    assert nodes["b"].feedback == "\nnot b\nagain"


def test_expensive_feedback_goes_to_the_selected_sample_only_and_replaces_its_own() -> None:
    call, nodes = grown()
    # After the check: a 0/3 of 13 scores 1.31, b 0/10 of 13 scores .72, a1 and a2 0/1 of 3 score 1.48.
    backpropagate(nodes["b"], 0, visits=9)
    nodes["a1"].feedback, nodes["a2"].feedback = "\nold", "\nkept"
    call.active_sample_id, call.conversation = nodes["a2"].id, nodes["a2"].data
    asked: list[tuple[str, int]] = []

    def ask(shown: AICall) -> str:
        asked.append((last_output(shown), shown.active_sample_id))
        return "new"

    passed, node = evaluate_condition(lambda x: False, call, ask, feedback_expensive=True)
    assert not passed
    assert node is nodes["a1"]
    assert asked == [("a1", nodes["a1"].id)]
    assert [nodes[name].feedback for name in ("a", "a1", "a2", "b")] == ["", "\nnew", "\nkept", ""]
    assert call.active_sample_id == nodes["a2"].id


def test_no_expensive_feedback_after_a_pass() -> None:
    call, _ = grown()
    evaluate_condition(starts("b"), call, lambda x: pytest.fail("asked"), feedback_expensive=True)


def test_the_call_shows_what_it_showed_before() -> None:
    call, nodes = grown()
    evaluate_condition(lambda x: False, call)
    assert call.conversation is nodes["b"].data
    assert call.active_sample_id == nodes["b"].id


@pytest.mark.parametrize("where", ["condition", "feedback", "expensive", "type"])
def test_an_exception_restores_everything(where: str) -> None:
    call, nodes = grown()
    nodes["b"].feedback = "\nearlier"
    before = [copy.deepcopy(vars(node) | {"parent": None, "children": None}) for node in nodes.values()]
    conversation, active = call.conversation, call.active_sample_id
    error: type[Exception] = ZeroDivisionError

    def condition(shown: AICall) -> bool:
        if where == "condition" and last_output(shown) == "a2":
            raise ZeroDivisionError("here")
        return None if where == "type" and last_output(shown) == "a2" else False  # type: ignore[return-value]

    def feedback(shown: AICall) -> str:
        if where in ("feedback", "expensive") and (where == "expensive" or last_output(shown) == "a2"):
            raise ZeroDivisionError("here")
        return "F"

    if where == "type":
        error = TypeError
    with pytest.raises(error) as caught:
        evaluate_condition(condition, call, feedback, feedback_expensive=where == "expensive")
    culprit = nodes["b" if where == "expensive" else "a2"]
    assert f"checking sample {culprit.id}" in "".join(caught.value.__notes__)
    assert call.conversation is conversation
    assert call.active_sample_id == active
    after = [vars(node) | {"parent": None, "children": None} for node in nodes.values()]
    assert after == before


def test_a_condition_may_raise_stop_iteration() -> None:
    call, _ = grown()
    with pytest.raises(StopIteration):
        evaluate_condition(lambda x: next(iter([])), call)


def test_bad_arguments() -> None:
    call, _ = grown()
    with pytest.raises(TypeError, match="condition"):
        evaluate_condition("x", call)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Feedback"):
        evaluate_condition(starts("a"), call, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Feedback"):
        evaluate_condition(starts("z"), call, lambda x: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="True or False"):
        evaluate_condition(lambda x: 1, call)  # type: ignore[arg-type, return-value]


# airetry


def test_a_call_must_have_been_run() -> None:
    call, _ = scripted("a")
    with pytest.raises(RuntimeError, match="not been run"):
        airetry(starts("a"), call)
    with pytest.raises(ValueError, match="negative"):
        airetry(starts("a"), run(call), max_retries=-1)


def test_a_pass_needs_no_retry() -> None:
    call, model = scripted("a")
    assert airetry(starts("a"), run(call), "F") is call
    assert retry is airetry
    assert len(model.calls) == 1
    assert (call.success, call.config.retries, call.config.calls) == (True, 0, 1)
    assert stats(call) == [(1, 1), (1, 1)]


def test_what_the_model_sees_on_a_retry() -> None:
    call, model = scripted("x", "y", "a")
    airetry(starts("a"), run(call), lambda c: f"not {last_output(c)}")
    assert [message.content for message in model.calls[2].prompt] == [
        "Act as a helpful AI assistant",
        "prompt",
        "x",
        "### Feedback from Evaluator\n\nnot x\n",
        "y",
        "### Feedback from Evaluator\n\nnot y\n",
    ]
    assert last_output(call) == "a"
    assert [len(node.data) for node in pre_order(call.samples)] == [2, 4, 6, 7]
    assert call.config.retries == 2
    assert call.conversation is call.samples[call.active_sample_id].data  # type: ignore[union-attr]


def test_without_feedback_nothing_is_added() -> None:
    call, model = scripted("x", "a")
    airetry(starts("a"), run(call))
    assert len(model.calls[1].prompt) == 3
    assert [len(node.data) for node in pre_order(call.samples)] == [2, 3, 4]


COLOURS = """\
SampleNode(id, stats: 6/12, score: 0.5, length: 2)
├─ SampleNode(id, stats: 5/8, score: 1.41, length: 4)
│  ├─ SampleNode(id, stats: 3/4, score: 1.77, length: 6)
│  │  ├─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
│  │  └─ SampleNode(id, stats: 1/1, score: 2.67, length: 7)
│  └─ SampleNode(id, stats: 1/2, score: 1.94, length: 5)
└─ SampleNode(id, stats: 1/4, score: 1.36, length: 4)
   ├─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
   └─ SampleNode(id, stats: 0/1, score: 1.67, length: 5)
"""


def test_three_checks_in_a_row_grow_the_published_tree(caplog: pytest.LogCaptureFixture) -> None:
    replies = ["Blue", "Red", "blue", "red", "blue", "blue", "yellow", "yellow"]
    call, model = scripted(*replies, config=RetryConfig(n_samples=2), api_kwargs={"n": 2})
    run(call)
    with caplog.at_level(logging.INFO, logger="aici_vllm.agents"):
        airetry(lambda x: " " not in last_output(x), call, "You must answer with 1 word only.")
        assert caplog.messages == []
        airetry(lambda x: last_output(x).islower(), call, "You must answer in lowercase.")
        assert caplog.messages == ["Condition not met. Retrying..."]
        airetry(starts("y"), call, 'It starts with "y"')
    assert caplog.messages == ["Condition not met. Retrying..."] * 3
    assert tree_text(call) == COLOURS
    assert last_output(call) == "yellow"
    active = call.samples[call.active_sample_id]
    assert active is not None
    assert active.data is call.conversation
    assert active is call.samples.children[0].children[0].children[1]
    assert (call.config.retries, call.config.calls, len(model.calls)) == (3, 8, 4)


def test_the_budget_of_retries(caplog: pytest.LogCaptureFixture) -> None:
    call, model = scripted(*"xyz", config=RetryConfig(max_retries=2))
    with caplog.at_level(logging.INFO, logger="aici_vllm.agents"):
        airetry(starts("a"), run(call), "F")
    assert len(model.calls) == 3
    assert call.success is False
    assert caplog.messages[-1] == (
        "Condition not met, but maximum retry budget was reached (Retries: 2/2, Calls: 3/99)."
    )
    with pytest.raises(RetryBudgetExceeded, match=r"budget reached \(Retries: 2/2, Calls: 3/99\)\."):
        airetry(starts("a"), call, "F", throw=True)
    assert issubclass(RetryBudgetExceeded, RuntimeError)
    assert call.success is False
    assert len(call.samples) == 4


def test_max_retries_of_the_call_overrides_and_the_counter_is_shared() -> None:
    call, model = scripted(*"vwxyz", config=RetryConfig(max_retries=1))
    airetry(starts("a"), run(call), max_retries=3)
    assert call.config.retries == 3
    airetry(starts("a"), call)
    assert len(model.calls) == 4
    with pytest.raises(RetryBudgetExceeded, match=r"Retries: 3/0"):
        airetry(starts("a"), call, max_retries=0, throw=True)
    assert len(model.calls) == 4


def test_the_budget_of_calls() -> None:
    call, model = scripted(*"vwxyz", config=RetryConfig(max_calls=2))
    with pytest.raises(RetryBudgetExceeded, match=r"Retries: 1/10, Calls: 2/2"):
        airetry(starts("a"), run(call), throw=True)
    assert len(model.calls) == 2


def test_quiet(caplog: pytest.LogCaptureFixture) -> None:
    call, _ = scripted(*"xyz", verbose=False, config=RetryConfig(max_retries=2))
    with caplog.at_level(logging.INFO, logger="aici_vllm.agents"):
        airetry(starts("a"), run(call), verbose=1)
        airetry(starts("a"), call, verbose=0)
    assert caplog.messages == []


def test_a_failed_first_call_is_retried_with_the_prompt() -> None:
    call, model = scripted(ConnectionError("down"), "ok", config=RetryConfig(catch_errors=True))
    run(call)
    assert isinstance(call.error, ConnectionError)
    airetry(is_valid, call, retry_delay=0, max_retries=2)
    assert call.success is True
    assert last_output(call) == "ok"
    assert [message.content for message in model.calls[1].prompt][1:] == ["prompt"]
    assert (call.config.retries, call.config.calls) == (1, 1)
    assert isinstance(call.error, ConnectionError)
    assert len(call.samples.data) == 2


def test_a_call_that_keeps_failing() -> None:
    downs = [ConnectionError(str(number)) for number in range(3)]
    call, model = scripted(*downs, "ok", config=RetryConfig(catch_errors=True))
    airetry(is_valid, run(call), max_retries=2)
    assert call.success is False
    assert len(model.calls) == 3
    assert (call.config.retries, call.config.calls) == (2, 0)
    assert str(call.error) == "2"
    airetry(is_valid, call, max_retries=3)
    assert call.success is True
    assert [message.content for message in model.calls[3].prompt][1:] == ["prompt"]


def test_an_error_of_the_model_passes_through_and_can_be_repeated() -> None:
    call, model = scripted("x", ConnectionError("down"), "a")
    run(call)
    with pytest.raises(ConnectionError):
        airetry(starts("a"), call, "F")
    assert call.config.retries == 1
    assert call.success is False
    assert len(call.samples) == 2
    airetry(starts("a"), call, "F")
    assert call.success is True
    contents = [message.content for message in model.calls[2].prompt]
    assert contents[2:] == ["x", "### Feedback from Evaluator\n\nF\nF\n"]  # one message, two failed checks
    assert [len(node.data) for node in pre_order(call.samples)] == [2, 4, 5]


def test_a_sample_chosen_twice_carries_one_feedback_message() -> None:
    call, model = scripted("ab", "cd", "ef", "yy", config=RetryConfig(max_retries=3, scoring=UCT(0.0)))
    run(call)
    for _ in range(3):
        airetry(starts("a"), call)
    # Without exploration the first sample, with 3 of 4, beats its children and is chosen every time.
    airetry(starts("y"), call, "F")
    chosen = call.samples.children[0]
    assert len(chosen.children) == 3
    assert [message.content for message in chosen.data[2:]] == ["ab", "### Feedback from Evaluator\n\nF\n"]
    for request in model.calls[1:]:
        roles = [type(message) for message in request.prompt]
        assert (UserMessage, UserMessage) not in list(itertools.pairwise(roles))


@pytest.mark.parametrize(
    "copied", [AICall.copy, copy.deepcopy, lambda call: pickle.loads(pickle.dumps(call))]
)
def test_a_copy_knows_whose_feedback_ends_its_conversation(copied: Callable[[AICall], AICall]) -> None:
    call, _ = scripted("x", ConnectionError("down"), config=RetryConfig(catch_errors=True))
    airetry(starts("a"), run(call), "F", max_retries=1)
    twin = copied(call)
    twin.kwargs["model"] = ScriptedModel(["a"])
    airetry(starts("a"), twin, "F", max_retries=2)
    assert [message.content for message in twin.samples.children[0].data[2:]] == [
        "x",
        "### Feedback from Evaluator\n\nF\nF\nF\n",
    ]


def test_feedback_in_place() -> None:
    call, model = scripted("x", "y", "a", config=RetryConfig(feedback_inplace=True))
    airetry(starts("a"), run(call), lambda c: f"not {last_output(c)}")
    prompts = [[message.content for message in request.prompt][1:] for request in model.calls]
    assert prompts == [
        ["prompt"],
        ["prompt\n\n### Feedback from Evaluator\n\nnot x\n"],
        ["prompt\n\n### Feedback from Evaluator\n\nnot x\n----------\n\nnot y\n"],
    ]
    # The samples keep their replies.
    said = [node.data[-1].content for node in pre_order(call.samples)]
    assert said == ["prompt", "x", "y", "a"]


def test_feedback_in_place_does_not_grow_with_repeated_feedback() -> None:
    call, model = scripted(*"uvwxyz", "a", config=RetryConfig(feedback_inplace=True))
    airetry(starts("a"), run(call), "same")
    assert model.calls[-1].prompt[1].content == "prompt\n\n### Feedback from Evaluator\n\nsame\n"


def test_an_unknown_feedback_template() -> None:
    call, _ = scripted("x", "a", config=RetryConfig(feedback_template="Nope"))
    with pytest.raises(TemplateNotFound, match="Nope"):
        airetry(starts("a"), run(call), "F")
    assert [len(node.data) for node in pre_order(call.samples)] == [2, 3]
    assert call.config.retries == 0
    call.config.feedback_template = "FeedbackFromEvaluator"
    assert airetry(starts("a"), call, "F").success is True


def test_a_condition_that_raises_leaves_the_call_usable() -> None:
    call, _ = scripted("x", "y", config=RetryConfig(n_samples=2))
    run(call)
    before = call.copy()
    with pytest.raises(KeyError):
        airetry(lambda c: {"x": True}[last_output(c)], call, "F")
    assert call == before
    assert call.conversation is call.samples[call.active_sample_id].data  # type: ignore[union-attr]
    assert airetry(starts("x"), call).success is True
    assert last_output(call) == "x"


def test_pre_order_selects_the_root_on_a_tie() -> None:
    call, model = scripted("x", "y", "a", config=RetryConfig(ordering="PreOrderDFS"))
    airetry(starts("a"), run(call), "F", max_retries=1)
    # Root and sample both score 0 after one failed check (ln 1 = 0); the root comes first.
    assert [message.content for message in model.calls[1].prompt][1:] == ["prompt"]
    assert len(call.samples.children) == 2


def test_the_delay_is_slept_before_each_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    call, _ = scripted(*"xyza", config=RetryConfig(retry_delay=2))
    airetry(starts("y"), run(call))
    airetry(starts("a"), call, retry_delay=5)
    assert slept == [2, 5, 5]


def test_the_sampler_is_told_the_condition_and_the_sample() -> None:
    rounds: list[SampleRound] = []

    class Branches:
        def sample(self, round: SampleRound) -> Any:
            rounds.append(round)
            for text in ("b", "a"):
                yield [*round.conversation, AIMessage(text)]

    call, model = scripted("x", config=RetryConfig(n_samples=2, max_calls=5), api_kwargs={"n": 1})
    run(call, sampler=Branches())
    condition = starts("z")
    airetry(condition, call, "F", max_retries=1, sampler=Branches())
    assert model.calls == []
    assert rounds[1].condition is condition
    assert rounds[1].parent is call.samples.children[0]
    assert rounds[1].calls_left == 3
    assert rounds[1].conversation[-1].content == "### Feedback from Evaluator\n\nF\n"
    assert call.config.calls == 4


def test_a_deep_branch_of_retries() -> None:
    def model(conversation: Conversation, **kwargs: Any) -> Conversation:
        return [UserMessage("p"), AIMessage("x")]

    call = AICall(model, "p", config=RetryConfig(max_retries=300, max_calls=1000))
    airetry(lambda c: c.config.calls == 300, run(call), verbose=0)
    assert call.success is True
    assert call.config.calls == 300


def test_a_call_whose_tree_is_a_chain_of_10_000_samples() -> None:
    model = ScriptedModel(["x", "a"])
    call = run(AIGenerate(model, "p", config=RetryConfig(n_samples=1, max_calls=20_000)))
    node = call.samples.children[0]
    for number in range(9_998):
        node.feedback, node.success = f"\nno {number}", False
        node = expand(node, [*call.samples.data, AIMessage("x")], success=True)
    call.conversation, call.active_sample_id = node.data, node.id
    call.config.feedback_inplace = True
    airetry(starts("a"), call, "the last")
    assert call.success is True and len(call.samples) == 10_001
    assert model.calls[1].prompt[-1].content.count("no ") == 9_998
    assert call.copy() == call
    for twin in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert twin.samples == call.samples and len(twin.samples) == 10_001
    assert "Success: True" in repr(call)
