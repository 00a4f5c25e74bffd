"""The environment with step results."""

import pytest

from aici_vllm.recursive import LocalREPLEnv, StepResult


def test_an_episode():
    with LocalREPLEnv() as env:
        result = env.reset(context="Hello World", task_prompt="Count chars")
        assert isinstance(result, StepResult) and not result.done
        assert result.observation.context_length == 11
        assert env.execute("count = len(context)").observation.result.success
        result = env.execute("print(f'FINAL({count})')")
        assert result.done and result.reward == result.observation.reward
        assert env.state().final_answer == "11"
        assert env.state().context == "Hello World" and env.state().task_prompt == "Count chars"
    with pytest.raises(RuntimeError):
        env.state()


def test_the_ways_to_finish():
    with LocalREPLEnv() as env:
        for blocks in (
            ["answer = 42", "FINAL(answer)"],
            ["answer = 42", "print(f'FINAL({answer})')"],
            ["my_result = '42'", 'FINAL_VAR("my_result")'],
            ["my_result = '42'", "print('FINAL_VAR(my_result)')"],
            ["answer['content'] = '42'", "answer['ready'] = True"],
        ):
            env.reset()
            results = [env.execute(block) for block in blocks]
            assert [result.done for result in results] == [False, True], blocks
            assert env.state().final_answer == "42", blocks
        env.reset()
        assert env.submit_final_answer("mine").done and env.state().final_answer == "mine"


def test_variables_can_be_listed_and_shown():
    with LocalREPLEnv(llm_query_fn=str.upper, llm_batch_fn=lambda ps: [p.upper() for p in ps]) as env:
        result = env.reset(context="c", max_iterations=5)
        assert {"llm_query", "llm_batch", "SHOW_VARS"} <= set(result.observation.available_variables)
        env.execute("r = llm_query('hello')\nr2 = rlm_query('world')")
        assert {"r", "r2"} <= set(env.list_variables())
        assert env.get_variable("r").observation.result.stdout == "'HELLO'\n"
        assert "r2" in env.execute("print(SHOW_VARS())").observation.result.stdout


def test_rewards_and_limits_reach_the_environment():
    with LocalREPLEnv(max_output_length=10) as env:
        assert env.reset(expected_answer="x", max_iterations=3).observation.max_iterations == 3
        assert env.execute("print('y' * 50)").observation.result.stdout.startswith("y" * 10 + "\n")
        assert env.execute("FINAL('x')").reward == 1.0
