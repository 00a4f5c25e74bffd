"""The controller of a served environment."""

import pytest

from aici_vllm.recursive import DirectLMBackend, LocalChildRLMBackend, create_server_recursive_controller


def chat(messages, model=None):
    return "```repl\nprint(FINAL('child'))\n```" if len(messages) > 1 else "plain"


@pytest.mark.parametrize("max_depth", [0, 1])
def test_without_depth_there_are_no_recursive_functions(max_depth):
    controller = create_server_recursive_controller(chat, max_depth=max_depth, max_iterations=4)
    assert controller.llm_query_fn("hello") == "plain"
    assert controller.llm_batch_fn(["a", "b"]) == ["plain", "plain"]
    assert controller.rlm_query_fn is None and controller.rlm_batch_fn is None
    assert type(controller.backend) is DirectLMBackend
    controller.close()


def test_with_depth_children_run():
    controller = create_server_recursive_controller(
        chat, max_depth=2, max_iterations=4, max_children_total=2, result_truncation_limit=3
    )
    assert type(controller.backend) is LocalChildRLMBackend and controller.backend.depth == 0
    assert controller.llm_query_fn("hello") == "pla"
    assert controller.rlm_query_fn("task") == "chi"
    assert controller.rlm_batch_fn(["task", "task"])[1] == "Error: max_children_total exceeded"


def test_a_new_episode_counts_children_from_zero():
    controller = create_server_recursive_controller(chat, max_depth=2, max_iterations=4, max_children_total=1)
    for _ in range(2):
        assert controller.rlm_query_fn("task") == "child"
        assert controller.rlm_query_fn("task") == "Error: max_children_total exceeded"
        controller.start_episode()
        assert controller.backend.child_traces == []
