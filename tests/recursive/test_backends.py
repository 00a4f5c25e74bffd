"""Backends: depth, counters, batches, traces and callbacks, with the documented results as oracle."""

import threading
from dataclasses import fields
from typing import ClassVar

import pytest

from aici_vllm.recursive import (
    BackendLimits,
    CallNode,
    ChildTrace,
    DirectLMBackend,
    LocalChildRLMBackend,
    RLMRunResult,
)
from aici_vllm.recursive.deadline import Deadline, DeadlineExceeded


def upper(messages, model=None):
    [message] = messages
    assert message["role"] == "user"
    return message["content"].upper()


class FakeRunner:
    """A child that records how it was made and run, and answers with its prompt."""

    made: ClassVar[list["FakeRunner"]]

    def __init__(self, llm_chat_fn, **kwargs):
        self.chat, self.kwargs = llm_chat_fn, kwargs
        self.backend = kwargs["backend_factory"](
            llm_chat_fn,
            system_prompt=kwargs["system_prompt"],
            max_iterations=kwargs["max_iterations"],
            max_depth=99,
            depth=kwargs["depth"],
            env_max_iterations_multiplier=kwargs["env_max_iterations_multiplier"],
        )
        type(self).made.append(self)

    def run(self, context, task, *, model=None, timeout_s=None):
        self.ran = (context, task, model, timeout_s)
        return RLMRunResult(self.answer(context), [], 1, self.kwargs["depth"], [])

    def answer(self, prompt):
        if prompt == "fail":
            raise ValueError("child broke")
        if prompt == "none":
            return None
        if prompt.startswith("nest "):
            return self.backend.recursive_query(prompt[5:])
        return f"child:{prompt}"


def child_backend(chat=upper, depth=0, factory=None, strict=False, callbacks=None, **limits):
    class Fresh(FakeRunner):
        made: ClassVar[list[FakeRunner]] = []

    backend = LocalChildRLMBackend(
        chat,
        runner_factory=factory or Fresh,
        system_prompt="SP",
        max_iterations=4,
        env_max_iterations_multiplier=5,
        depth=depth,
        limits=BackendLimits(**limits),
        strict=strict,
        **(callbacks or {}),
    )
    backend.made = Fresh.made
    return backend


# Limits and traces as dataclasses


def test_limits_have_the_documented_defaults_and_hidden_counter():
    limits = BackendLimits()
    assert (limits.max_depth, limits.max_batch_workers) == (1, 8)
    assert limits.max_children_total is limits.max_children_per_batch is None
    assert limits.result_truncation_limit is limits.per_child_timeout_s is None
    assert limits._children_spawned == 0 and "_children_spawned" not in repr(limits)
    with pytest.raises(TypeError):
        BackendLimits(_children_spawned=3)


def test_a_trace_has_the_five_documented_fields_first():
    assert [field.name for field in fields(ChildTrace)][:5] == [
        "depth",
        "duration_s",
        "prompt_preview",
        "result_preview",
        "error",
    ]
    assert ChildTrace(1, 0.5, "p", None, None).children == []


# Direct backend


def test_a_query_sends_one_user_message():
    seen = []

    def chat(messages, model=None):
        seen.append((messages, model))
        return "answer"

    backend = DirectLMBackend(chat)
    assert backend.query("hi") == "answer" and backend.query("ho", "big") == "answer"
    assert seen == [([{"role": "user", "content": "hi"}], None), ([{"role": "user", "content": "ho"}], "big")]


def test_max_depth_is_copied_when_the_backend_is_made():
    limits = BackendLimits(max_depth=3)
    backend = DirectLMBackend(upper, depth=1, limits=limits)
    limits.max_depth = 9
    assert (backend.max_depth, backend.depth, backend.child_traces) == (3, 1, [])


@pytest.mark.parametrize(("limit", "result"), [(None, "ABCDEF"), (6, "ABCDEF"), (3, "ABC"), (0, "")])
def test_answers_are_cut_without_a_mark(limit, result):
    assert (
        DirectLMBackend(upper, limits=BackendLimits(result_truncation_limit=limit)).query("abcdef") == result
    )


def test_an_answer_of_none_passes_without_a_limit_and_fails_with_one():
    assert DirectLMBackend(lambda messages: None).query("x") is None
    with pytest.raises(TypeError):
        DirectLMBackend(lambda messages: None, limits=BackendLimits(result_truncation_limit=1)).query("x")


def test_a_batch_keeps_order_and_isolates_errors():
    def chat(messages, model=None):
        text = messages[0]["content"]
        if text == "bad":
            raise RuntimeError("kaput")
        return text.upper()

    backend = DirectLMBackend(chat, limits=BackendLimits(result_truncation_limit=4, max_children_per_batch=1))
    assert backend.query_batched(["slow", "bad", "x"]) == ["SLOW", "Error: kaput", "X"]
    assert backend.query_batched([]) == []


def test_the_recursive_queries_of_a_direct_backend_are_plain_and_leave_no_trace():
    backend = DirectLMBackend(upper, limits=BackendLimits(max_depth=5))
    assert backend.recursive_query("a") == "A"
    assert backend.recursive_query_batched(["a", "b"]) == ["A", "B"]
    assert backend.child_traces == [] and backend.limits._children_spawned == 0


def test_ten_thousand_queued_queries_use_a_bounded_number_of_threads():
    threads = set()

    def chat(messages):
        threads.add(threading.get_ident())
        return messages[0]["content"]

    prompts = [str(number) for number in range(10_000)]
    assert DirectLMBackend(chat, limits=BackendLimits(max_batch_workers=8)).query_batched(prompts) == prompts
    assert len(threads) <= 8


def test_no_query_starts_after_the_deadline():
    backend = DirectLMBackend(upper)
    backend.deadline = Deadline(0)
    with pytest.raises(DeadlineExceeded):
        backend.query("a")
    assert backend.query_batched(["a"]) == ["Error: the deadline of this run has passed"]


# Children


@pytest.mark.parametrize("max_depth", [0, 1])
def test_without_depth_there_are_no_children(max_depth):
    backend = child_backend(max_depth=max_depth)
    assert backend.recursive_query("a") == "A"
    assert backend.child_traces == [] and backend.limits._children_spawned == 0


def test_a_child_gets_the_prompt_as_context_and_task():
    backend = child_backend(max_depth=3, max_batch_workers=2, per_child_timeout_s=7.0)
    assert backend.recursive_query("sub task", "big") == "child:sub task"
    [child] = backend.made
    assert child.ran == ("sub task", "sub task", "big", 7.0)
    kwargs = dict(child.kwargs)
    kwargs.pop("backend_factory")
    assert kwargs == {
        "system_prompt": "SP",
        "max_iterations": 4,
        "max_depth": 3,
        "depth": 1,
        "env_max_iterations_multiplier": 5,
        "max_batch_workers": 2,
        "on_subcall_start": None,
        "on_subcall_complete": None,
    }


def test_the_child_backend_shares_limits_and_takes_depth_from_its_arguments():
    backend = child_backend(max_depth=3)
    backend.recursive_query("a")
    inner = backend.made[0].backend
    assert inner.limits is backend.limits and inner.depth == 1 and inner.max_depth == 3


def test_depth_two_means_one_level_of_children():
    backend = child_backend(max_depth=2)
    assert backend.recursive_query("nest deeper") == "DEEPER"
    assert len(backend.made) == 1


def test_the_total_counts_the_whole_tree():
    backend = child_backend(max_depth=4, max_children_total=1)
    assert backend.recursive_query("nest deeper") == "Error: max_children_total exceeded"
    assert backend.recursive_query("again") == "Error: max_children_total exceeded"
    assert len(backend.child_traces) == 1 and backend.limits._children_spawned == 1


def test_the_total_is_exact_under_many_threads():
    backend = child_backend(max_depth=2, max_children_total=50, max_batch_workers=32)
    answers = backend.recursive_query_batched([f"p{n}" for n in range(200)])
    assert sum(answer.startswith("child:") for answer in answers) == 50
    assert answers.count("Error: max_children_total exceeded") == 150
    assert backend.limits._children_spawned == 50 and len(backend.child_traces) == 50


def test_a_trace_keeps_previews():
    backend = child_backend(max_depth=2, result_truncation_limit=100)
    assert len(backend.recursive_query("p" * 200)) == 100
    [trace] = backend.child_traces
    assert (trace.depth, trace.error, trace.prompt_preview) == (1, None, "p" * 80)
    assert trace.result_preview == ("child:" + "p" * 200)[:80] and trace.duration_s >= 0


def test_no_final_answer_is_empty_text():
    backend = child_backend(max_depth=2)
    assert backend.recursive_query("none") == ""
    assert backend.child_traces[0].result_preview is None


def test_a_failed_child_raises_and_leaves_a_trace():
    backend = child_backend(max_depth=2)
    with pytest.raises(ValueError, match="child broke"):
        backend.recursive_query("fail")
    assert (backend.child_traces[0].error, backend.child_traces[0].result_preview) == ("child broke", None)
    assert backend.recursive_query_batched(["fail", "ok"]) == ["Error: child broke", "child:ok"]


def test_callbacks_come_for_every_child_and_their_errors_are_swallowed():
    events = []

    def start(depth, model, prompt):
        events.append(("start", depth, model, prompt))
        raise RuntimeError("ignored")

    def complete(depth, model, duration, error):
        events.append(("complete", depth, model, duration >= 0, error))
        raise RuntimeError("ignored")

    backend = child_backend(
        max_depth=3, callbacks={"on_subcall_start": start, "on_subcall_complete": complete}
    )
    backend.recursive_query("nest inner", "big")
    with pytest.raises(ValueError):
        backend.recursive_query("fail")
    assert events == [
        ("start", 1, "big", "nest inner"),
        ("start", 2, "default", "inner"),
        ("complete", 2, "default", True, None),
        ("complete", 1, "big", True, None),
        ("start", 1, "default", "fail"),
        ("complete", 1, "default", True, "child broke"),
    ]


def test_a_child_has_no_more_time_than_its_parent():
    backend = child_backend(max_depth=2, per_child_timeout_s=1000.0)
    backend.deadline = Deadline(60)
    backend.recursive_query("a")
    assert 50 < backend.made[0].ran[3] <= 60


# Batches of children


def test_a_batch_over_the_cap_is_shortened():
    backend = child_backend(max_depth=2, max_children_per_batch=2)
    assert backend.recursive_query_batched(["a", "b", "c", "d"]) == ["child:a", "child:b"]


def test_the_cap_holds_for_plain_calls_too():
    backend = child_backend(max_depth=1, max_children_per_batch=2)
    assert backend.recursive_query_batched(["a", "b", "c"]) == ["A", "B"]
    assert backend.query_batched(["a", "b", "c"]) == ["A", "B", "C"]


def test_strict_keeps_the_length_of_a_capped_batch():
    backend = child_backend(max_depth=2, max_children_per_batch=1, strict=True)
    refused = "Error: max_children_per_batch exceeded"
    assert backend.recursive_query_batched(["a", "b", "c"]) == ["child:a", refused, refused]


def test_a_cap_of_zero_is_a_clear_error():
    backend = child_backend(max_depth=2, max_children_per_batch=0)
    with pytest.raises(ValueError, match="max_children_per_batch"):
        backend.recursive_query_batched(["a"])
    assert backend.recursive_query_batched([]) == []


def test_nodes_are_added_under_the_node_of_the_run():
    backend = child_backend(max_depth=2)
    backend.node = CallNode("run", 0, "root")
    backend.query("a")
    backend.recursive_query("b")
    assert [(n.kind, n.depth, n.prompt, n.result) for n in backend.node.children] == [
        ("query", 0, "a", "A"),
        ("run", 1, "b", "child:b"),
    ]
