"""Programs written against the REPL environment's public names run after a change of the import."""

import dataclasses
import inspect

import aici_vllm.recursive as recursive

SPECIFIED = [
    "RecursiveBackend",
    "BackendLimits",
    "ChildTrace",
    "DirectLMBackend",
    "LocalChildRLMBackend",
    "RecursiveController",
    "create_server_recursive_controller",
    "LocalRLMRunner",
    "RLMRunResult",
    "LocalREPLEnv",
    "REPLEnvironment",
    "REPLAction",
    "REPLObservation",
    "REPLState",
    "CodeBlockResult",
    "StepResult",
    "RLM_SYSTEM_PROMPT",
    "RLM_SYSTEM_PROMPT_QWEN",
    "QueryMetadata",
    "build_rlm_system_prompt",
    "build_user_prompt",
    "build_initial_prompt",
    "extract_code_blocks",
    "format_observation",
    "format_observations",
    "Rubric",
    "ExactMatchRubric",
    "FuzzyMatchRubric",
    "CustomMetricRubric",
    "CodeExecutionRubric",
    "REPLRubric",
    "ChatFn",
]


def test_every_specified_name_is_exported():
    assert set(SPECIFIED) <= set(recursive.__all__)
    assert all(hasattr(recursive, name) for name in recursive.__all__)


def arguments(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def test_the_runner_has_the_documented_arguments():
    got = arguments(recursive.LocalRLMRunner.__init__)
    documented = {
        "llm_chat_fn": inspect.Parameter.empty,
        "system_prompt": recursive.RLM_SYSTEM_PROMPT,
        "max_iterations": 30,
        "max_depth": 2,
        "depth": 0,
        "env_max_iterations_multiplier": 5,
        "max_batch_workers": 8,
        "backend_factory": None,
        "max_children_total": None,
        "max_children_per_batch": None,
        "result_truncation_limit": None,
        "per_child_timeout_s": None,
        "on_subcall_start": None,
        "on_subcall_complete": None,
        "verbose": False,
    }
    assert dict(list(got.items())[: len(documented)]) == documented
    assert list(arguments(recursive.LocalRLMRunner.run)) == ["context", "task_prompt", "model", "timeout_s"]


def test_the_result_has_the_documented_fields_first():
    names = [field.name for field in dataclasses.fields(recursive.RLMRunResult)]
    assert names[:5] == ["final_answer", "messages", "iterations", "depth", "child_traces"]


def test_a_hand_written_loop_over_an_environment():
    from aici_vllm.recursive import (
        RLM_SYSTEM_PROMPT,
        LocalREPLEnv,
        build_initial_prompt,
        extract_code_blocks,
        format_observation,
    )

    replies = iter(["```repl\ncount = context.count('fox')\nprint(count)\n```", "```repl\nFINAL(count)\n```"])
    with LocalREPLEnv() as env:
        result = env.reset(context="The quick brown fox. " * 1000, task_prompt="Count 'fox'")
        messages = [
            {"role": "system", "content": RLM_SYSTEM_PROMPT},
            {
                "role": "user",
                "content": build_initial_prompt(
                    task_prompt="Count 'fox'",
                    context_length=result.observation.context_length,
                    context_preview=result.observation.context_preview,
                    variables=result.observation.available_variables,
                ),
            },
        ]
        while not result.done:
            response = next(replies)
            for code in extract_code_blocks(response):
                result = env.execute(code)
                if result.done:
                    break
            messages.append({"role": "assistant", "content": response})
            messages.append({"role": "user", "content": format_observation(result.observation)})
        assert env.state().final_answer == "1000"
    assert "REPL output" in messages[3]["content"] and "1000" in messages[3]["content"]


def test_a_backend_written_elsewhere_works():
    class Echo:
        """Implements the protocol with nothing of ours."""

        def __init__(self):
            self.max_depth, self.depth, self.child_traces = 2, 0, ["own trace"]

        def query(self, prompt, model=None):
            return f"q:{prompt}"

        def query_batched(self, prompts, model=None):
            return [f"b:{prompt}" for prompt in prompts]

        def recursive_query(self, prompt, model=None):
            return f"r:{prompt}"

        def recursive_query_batched(self, prompts, model=None):
            return [f"rb:{prompt}" for prompt in prompts]

    code = "FINAL([llm_query('1'), llm_query_batched(['2']), rlm_query('3'), rlm_query_batched(['4'])])"
    runner = recursive.LocalRLMRunner(
        lambda messages: f"```repl\n{code}\n```", backend_factory=lambda *a, **k: Echo()
    )
    result = runner.run("c", "t")
    assert result.final_answer == "['q:1', ['b:2'], 'r:3', ['rb:4']]"
    assert result.child_traces == ["own trace"]


def test_a_backend_may_make_the_turns_itself_and_see_the_conversation():
    class Whole(recursive.DirectLMBackend):
        messages = None

        def turn(self, messages, model=None):
            return "```repl\nFINAL(llm_query('how many?'))\n```"

        def query(self, prompt, model=None):
            return f"{len(self.messages)} messages"

    def unused(messages):
        raise AssertionError("the backend makes the turns")

    runner = recursive.LocalRLMRunner(unused, backend_factory=lambda chat, **kwargs: Whole(chat))
    assert runner.run("c", "t").final_answer == "3 messages"
